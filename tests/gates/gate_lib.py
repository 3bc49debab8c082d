"""What the gates share: listing sources, planting files for self-tests, reporting."""

import pathlib
import sys
import tempfile

SOURCE_SUFFIXES = {".h", ".cc", ".c", ".cu", ".cuh", ".in", ".py", ".cmake"}
FOLDERS = ("include", "src", "apps", "tests", "bench", "cmake", "scripts")


def sources(root, folders=FOLDERS, suffixes=frozenset(SOURCE_SUFFIXES)):
    """Source files below `root`, as paths relative to it, sorted."""
    found = []
    for folder in folders:
        for path in (root / folder).rglob("*"):
            if path.is_file() and (path.suffix in suffixes or path.name == "CMakeLists.txt"):
                if "__pycache__" not in path.parts:
                    found.append(path.relative_to(root))
    return sorted(found)


def planted(files):
    """A temporary tree holding {relative path: text}; use as a context manager."""
    holder = tempfile.TemporaryDirectory()
    root = pathlib.Path(holder.name)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return holder


def expect_caught(check, legal, cases):
    """Runs `check(root)` on a legal tree and on that tree with each planted violation.

    `cases` maps a violation's name to (files, text a finding must contain). Returns errors.
    """
    errors = []
    with planted(legal) as root:
        for finding in check(pathlib.Path(root)):
            errors.append(f"legal tree: unexpected finding: {finding}")
    for name, (files, text) in cases.items():
        with planted({**legal, **files}) as root:
            findings = check(pathlib.Path(root))
        if not any(text in finding for finding in findings):
            errors.append(f"{name}: expected a finding with '{text}', got {findings}")
    return errors


def report(findings, passed):
    """Prints findings and exits: 1 with any, 0 without."""
    for finding in findings:
        print(finding)
    if findings:
        sys.exit(1)
    print(passed)
    sys.exit(0)
