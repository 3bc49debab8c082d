#!/usr/bin/env python3
"""Fails on a byte outside ASCII in a source; files listed in ALLOWED may have them inside string
literals."""

import argparse
import pathlib
import re

import gate_lib

# File: why its strings hold other characters.
ALLOWED = {
    "apps/twilight/chart.cc": "draws charts of block characters",
    "apps/twilight/cmd_inspect.cc": "quotes of its report",
    "apps/twilight/inspect_page.cc": "quotes of its page",
    "apps/twilight/inspect_panels.cc": "separators of its picture",
    "apps/twilight/markup.cc": "shows white space and cut words",
    "apps/twilight/progress.cc": "draws a bar of block characters",
    "scripts/golden/make_tokenizer_goldens.py": "texts of many scripts",
}

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
RAW_STRING = re.compile(r'R"([^()\s\\]{0,16})\(.*?\)\1"', re.DOTALL)


def without_strings(text):
    """The text with string literals emptied, its lines where they were."""
    text = RAW_STRING.sub(lambda match: '""' + "\n" * match.group(0).count("\n"), text)
    return "\n".join(STRING.sub('""', line) for line in text.split("\n"))


def check(root, allowed=None):
    allowed = ALLOWED if allowed is None else allowed
    findings = []
    for path in gate_lib.sources(root):
        in_strings = path.as_posix() in allowed
        text = (root / path).read_bytes().decode("utf-8", errors="replace")
        if in_strings:
            text = without_strings(text)
        for number, line in enumerate(text.split("\n"), 1):
            if not line.isascii():
                findings.append(f"{path}:{number}: a character outside ASCII")
    return findings


def self_test():
    allowed = {"apps/run/bar.cc": "draws a bar"}
    legal = {"src/core/a.cc": "// plain\n",
             "apps/run/bar.cc": 'auto s = "\u2588";  // bar\nauto r = R"(\n\u2588 "x)";\n'}
    cases = {
        "comment": ({"src/core/z.cc": "// caf\u00e9\n"}, "z.cc:1"),
        "string in the library": ({"src/core/z.cc": '\nauto s = "\u2588";\n'}, "z.cc:2"),
        "comment after a raw string": (
            {"apps/run/bar.cc": 'auto s = R"(\n\u2588\n)";\n// \u2588\n'}, "bar.cc:4"),
        "comment of an allowed file": ({"apps/run/bar.cc": "// \u2588\n"}, "bar.cc:1"),
        "string of another app": ({"apps/run/z.cc": 'auto s = "\u2588";\n'}, "z.cc:1"),
        "dash": ({"cmake/z.cmake": "# a \u2014 b\n"}, "z.cmake:1"),
    }
    return gate_lib.expect_caught(lambda root: check(root, allowed), legal, cases)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path)
    parser.add_argument("--self-test", action="store_true")
    flags = parser.parse_args()
    if flags.self_test:
        gate_lib.report(self_test(), "every planted character was caught")
    gate_lib.report(check(flags.root), "all sources are ASCII")


if __name__ == "__main__":
    main()
