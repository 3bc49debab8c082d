#!/usr/bin/env python3
"""Fails when the library references a symbol that ends the process or writes to its output.

What the C++ runtime needs is left out of account: std::terminate of noexcept functions.
`__assert_fail` is accepted in builds with assertions only (--assertions).
"""

import argparse
import pathlib
import re
import subprocess
import tempfile

import gate_lib

ENDS = {"abort", "exit", "_exit", "_Exit", "quick_exit", "__assert_fail", "__assert"}
WRITES = {
    "stdout", "stderr", "printf", "fprintf", "vprintf", "vfprintf", "dprintf", "vdprintf", "puts",
    "fputs", "putchar", "fputc", "putc", "perror", "fwrite", "__printf_chk", "__fprintf_chk",
    "__vprintf_chk", "__vfprintf_chk", "syslog",
}
# std::cout, cerr, clog, their wide twins; Highway's own abort.
MANGLED = re.compile(r"^_ZSt(4|5w)(cout|cerr|clog)$|^_ZN3hwy5Abort")


def undefined(library):
    """Names a shared library, archive or object takes from elsewhere."""
    dynamic = ["-D"] if re.search(r"\.so(\.|$)", library.name) else []
    text = subprocess.run(["nm", *dynamic, "--undefined-only", "--format=posix", library],
                          check=True, capture_output=True, text=True).stdout
    # An archive's members come as "lib.a[member.o]:" lines.
    return {line.split()[0].split("@")[0] for line in text.splitlines()
            if line.strip() and not line.endswith(":")}


def check(library, assertions):
    findings = []
    names = undefined(library)
    if not names:
        return [f"{library}: no undefined symbols at all, so this is not the library"]
    for name in sorted(names):
        if name == "__assert_fail" and assertions:
            continue
        if name in ENDS:
            findings.append(f"{library.name}: references {name}, which ends the process")
        if name in WRITES or MANGLED.match(name):
            findings.append(f"{library.name}: references {name}, which writes to the output")
    return findings


def self_test(compiler):
    clean = "#include <stdexcept>\nvoid f() { throw std::runtime_error(\"x\"); }\n"
    cases = {
        "abort": "#include <cstdlib>\nvoid f() { std::abort(); }\n",
        "exit": "#include <cstdlib>\nvoid f() { std::exit(3); }\n",
        "_exit": "#include <unistd.h>\nvoid f() { _exit(3); }\n",
        "printf": "#include <cstdio>\nvoid f(int i) { std::printf(\"%d\", i); }\n",
        "puts": "#include <cstdio>\nvoid f() { std::printf(\"text\\n\"); }\n",
        "stderr": "#include <cstdio>\nvoid f() { std::fputs(\"a\", stderr); }\n",
        "_ZSt4cout": "#include <iostream>\nvoid f() { std::cout << 1; }\n",
        "_ZSt4cerr": "#include <iostream>\nvoid f() { std::cerr << 1; }\n",
        "__assert_fail": "#include <cassert>\nvoid f(int i) { assert(i); }\n",
    }
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        def findings_of(text, suffix, flags):
            source = pathlib.Path(folder) / "planted.cc"
            source.write_text(text, encoding="utf-8")
            output = source.with_suffix(suffix)
            subprocess.run([compiler, "-fPIC", *flags, source, "-o", output], check=True)
            return check(output, assertions=False)

        for suffix, flags in ((".o", ["-c"]), (".so", ["-shared"])):
            for finding in findings_of(clean, suffix, flags):
                errors.append(f"clean{suffix}: unexpected finding: {finding}")
            for name, text in cases.items():
                findings = findings_of(text, suffix, flags)
                if not any(f"references {name}," in finding for finding in findings):
                    errors.append(f"{name}{suffix}: not caught, got {findings}")
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=pathlib.Path)
    parser.add_argument("--assertions", action="store_true")
    parser.add_argument("--self-test", metavar="CXX")
    flags = parser.parse_args()
    if flags.self_test:
        gate_lib.report(self_test(flags.self_test), "every planted symbol was caught")
    gate_lib.report(check(flags.library, flags.assertions), "the library neither ends nor prints")


if __name__ == "__main__":
    main()
