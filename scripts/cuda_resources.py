#!/usr/bin/env python3
"""Registers, spills and static shared memory of every CUDA kernel, checked against budgets.

Compiles each .cu file of a build's compile_commands.json once more for one architecture with
ptxas's report on; no GPU is needed. A spill costs a memory-bound kernel 20 to 50 % of its time, so
none is accepted unless a budget says so. Fails on a kernel over its budget, and on a budget that
matches no kernel.
"""

import argparse
import concurrent.futures
import json
import pathlib
import re
import shlex
import subprocess
import sys

# Pattern over the demangled name, most special first: (registers, spill bytes).
BUDGETS = [
    # Two blocks of 512 threads share a multiprocessor; what is spilled lives across phases, not in
    # their loops. Fewest registers where a block is alone with a cluster.
    # Eight heads a group keep twice the queries of four in the same 64 registers.
    (r"cuda_fast::step_kernel<.*Config<128, 8, 512, 1,", (64, 1700)),
    (r"cuda_fast::step_kernel<", (128, 1100)),
    # Four blocks of 128 threads on a multiprocessor, three of them.
    (r"cuda_fast::(.*::)?rows_kernel<", (128, 0)),
    # 704 threads; what is spilled lives across norms, not in the loops over stages.
    (r"cuda_fast::(.*::)?layer_kernel<", (80, 64)),
    (r"cuda_fast::(.*::)?dense_kernel<.*false>", (168, 0)),
    # Generic kernels: correct for every shape, fast for none. A few bytes of spills at a register
    # limit chosen by the compiler are no loss there.
    (r"base::.*attend_kernel<.*, \d+, 8>", (255, 0)),
    (r"base::.*attend_kernel<.*, \d+, [14]>", (128, 16)),
    (r"base::.*attend_prefill_kernel", (168, 0)),
    (r"base::.*", (128, 24)),
]
DEFAULT = (255, 0)

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def demangle(names):
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                         check=True).stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|\(.*", "", name) for name in out]


def compile_command(entry, arch):
    """The entry's command without its output, dependency and architecture options."""
    words = shlex.split(entry["command"]) if "command" in entry else list(entry["arguments"])
    while words and not words[0].endswith("nvcc"):  # a launcher such as ccache
        words.pop(0)
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("-o", "-MF", "-MT", "-x", "-c"):
            skip = word != "-c"
        elif not re.match(r"--?(MD|MMD|generate-code|gencode|arch)", word):
            kept.append(word)
    if arch == "sm_90" and "sm_90a" in entry.get("command", " ".join(entry.get("arguments", []))):
        arch = "sm_90a"  # code for Hopper alone
    return kept + ["-x", "cu", f"-arch={arch}", "-cubin", "-Xptxas=-v", "-o", "/dev/null"]


def kernels_of(entry, arch):
    run = subprocess.run(compile_command(entry, arch), cwd=entry["directory"], capture_output=True,
                         text=True)
    if run.returncode != 0:
        sys.exit(f"{entry['file']}: {run.stderr.strip()[-800:]}")
    name, spills, found = None, 0, []
    for line in (run.stdout + run.stderr).splitlines():
        if match := ENTRY.search(line):
            name = match[1]
        elif match := SPILLS.search(line):
            spills = int(match[1]) + int(match[2])
        elif name and (match := USED.search(line)):
            found.append((name, int(match[1]), spills, int(match[2] or 0)))
            name = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=pathlib.Path, help="build folder with compile_commands.json")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--jobs", type=int, default=2)
    flags = parser.parse_args()
    commands = json.loads((flags.build / "compile_commands.json").read_text())
    entries = [entry for entry in commands if entry["file"].endswith(".cu")]
    if not entries:
        sys.exit("no .cu file in compile_commands.json; configure with TWILIGHT_ENABLE_CUDA=ON")
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        kernels = [k for found in pool.map(lambda e: kernels_of(e, flags.arch), entries)
                   for k in found]
    names = demangle([kernel[0] for kernel in kernels])
    unused = {pattern for pattern, _ in BUDGETS}
    failed = False
    print(f"{'registers':>9} {'spills':>7} {'shared':>7}  kernel ({flags.arch})")
    for name, (_, registers, spills, shared) in sorted(zip(names, kernels)):
        budget = DEFAULT
        for pattern, numbers in BUDGETS:
            if re.search(pattern, name):
                unused.discard(pattern)
                budget = numbers
                break
        over = registers > budget[0] or spills > budget[1]
        failed |= over
        note = f"  OVER its budget of {budget[0]} registers, {budget[1]} bytes" if over else ""
        print(f"{registers:9} {spills:7} {shared:7}  {name}{note}")
    for pattern in sorted(unused):
        print(f"no kernel matches the budget {pattern}")
    sys.exit(1 if failed or unused else 0)


if __name__ == "__main__":
    main()
