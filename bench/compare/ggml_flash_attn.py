#!/usr/bin/env python3
"""Builds ggml_flash_attn.c against the ggml that llama-cpp-python installed, and runs it. JSON on stdout."""
import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import llama_cpp

import common


def build(folder):
    package = pathlib.Path(llama_cpp.__file__).parent
    libraries, include = package / "lib", package.parent / "include"
    program = pathlib.Path(folder) / "ggml_flash_attn"
    source = pathlib.Path(__file__).with_suffix(".c")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-std=gnu11", f"-I{include}", str(source), "-o", str(program),
                    f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lggml-cpu", "-lggml-base", "-lm"], check=True)
    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        program = build(folder)
        for batch in args.batch:
            numbers = [args.tokens, batch, args.heads, args.kv_heads, args.dim, args.threads, args.repeats]
            done = subprocess.run([str(program), *map(str, numbers)], check=True, stdout=subprocess.PIPE, text=True)
            results += [json.loads(line) for line in done.stdout.splitlines()]
    fastest = {str(b): min((r for r in results if r["batch"] == b), key=lambda r: r["median_ms"])
               for b in args.batch}
    shape = {"tokens": args.tokens, "heads": args.heads, "kv_heads": args.kv_heads, "dim": args.dim}
    print(json.dumps({"baseline": "ggml flash_attn_ext", "shape": shape,
                      "environment": common.environment(args.threads, ["llama_cpp_python"]),
                      "fastest": {b: [r["dtype"], r["variant"], r["median_ms"]] for b, r in fastest.items()},
                      "results": results}, indent=1))


if __name__ == "__main__":
    main()
