#!/usr/bin/env python3
"""Fails on a source of more than 800 lines; lists those of more than 400."""

import argparse
import pathlib

import gate_lib

AIM = 400
LIMIT = 800


def lengths(root):
    for path in gate_lib.sources(root):
        yield path, len((root / path).read_bytes().splitlines())


def check(root):
    return [f"{path}: {lines} lines, accepted up to {LIMIT}"
            for path, lines in lengths(root) if lines > LIMIT]


def self_test():
    legal = {"src/core/a.cc": "\n" * LIMIT, "cmake/b.cmake": "\n"}
    cases = {
        "source": ({"src/core/z.cc": "\n" * (LIMIT + 1)}, "801 lines"),
        "test": ({"tests/unit/z.cc": "\n" * 2000}, "2000 lines"),
        "script": ({"scripts/z.py": "\n" * (LIMIT + 1)}, "801 lines"),
    }
    return gate_lib.expect_caught(check, legal, cases)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path)
    parser.add_argument("--self-test", action="store_true")
    flags = parser.parse_args()
    if flags.self_test:
        gate_lib.report(self_test(), "every planted file was caught")
    for path, lines in lengths(flags.root):
        if AIM < lines <= LIMIT:
            print(f"note: {path}: {lines} lines")
    gate_lib.report(check(flags.root), f"no source above {LIMIT} lines")


if __name__ == "__main__":
    main()
