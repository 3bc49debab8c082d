"""Running the program and making model folders, broken ones included."""
import json
import os
import shutil
import struct
import subprocess
import unittest

PROGRAM = ""
SOURCE = ""
TIMEOUT = 300
ESCAPE = "\x1b"


def path(*parts):
    return os.path.join(SOURCE, *parts)


def vesper():
    return path("models", "vesper-19m")


class Result:
    def __init__(self, process):
        self.code = process.returncode
        self.out = process.stdout.decode("utf-8")  # raises where it is not UTF-8
        self.err = process.stderr.decode("utf-8")


def run(*arguments, cwd=None, before=None):
    """`before` runs in the new process, ahead of the program."""
    return Result(subprocess.run([PROGRAM, *map(str, arguments)], stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT,
                                 check=False, cwd=cwd, preexec_fn=before))


class ProgramTest(unittest.TestCase):
    maxDiff = None

    def check_quiet(self, result):
        """No progress and no escape codes in pipes."""
        for text in (result.out, result.err):
            self.assertNotIn(ESCAPE, text)
            self.assertNotIn("\r", text)
            self.assertNotIn("\u2588", text)

    def run_ok(self, *arguments):
        result = run(*arguments)
        self.assertEqual(result.code, 0, result.err)
        self.check_quiet(result)
        return result

    def run_json(self, *arguments, codes=(0,)):
        result = run(*arguments, "--json")
        self.assertIn(result.code, codes, result.err)
        self.assertEqual(result.err, "")
        self.check_quiet(result)
        return json.loads(result.out)

    def check_refused(self, code, parts, *arguments):
        """Exit status and one line on standard error that has every part."""
        result = run(*arguments)
        self.assertEqual(result.code, code, (arguments, result.err))
        self.assertEqual(result.out, "", arguments)
        self.check_quiet(result)
        lines = result.err.split("\n")
        self.assertEqual(len(lines), 2, result.err)
        self.assertEqual(lines[1], "")
        self.assertTrue(lines[0].startswith("twilight: "), lines[0])
        for part in parts:
            self.assertIn(part, lines[0])


def copy_model(to, source=None):
    """A copy whose files may be edited; large files are copied, never linked."""
    source = source or path("tests", "golden", "tiny", "qwen2.5-instruct")
    os.makedirs(to)
    for name in os.listdir(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(to, name))
    return to


class Safetensors:
    """One file in memory: header (a dict, in file order) and data."""

    def __init__(self, name):
        with open(name, "rb") as file:
            raw = file.read()
        self.name = name
        (length,) = struct.unpack("<Q", raw[:8])
        self.header = json.loads(raw[8:8 + length])
        self.data = bytearray(raw[8 + length:])

    def tensors(self):
        return sorted((k for k in self.header if k != "__metadata__"),
                      key=lambda k: self.header[k]["data_offsets"])

    def save(self):
        text = json.dumps(self.header).encode()
        with open(self.name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + self.data)


def write(name, data):
    with open(name, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    return name


def edit_json(name, edit):
    with open(name, encoding="utf-8") as file:
        value = json.load(file)
    edit(value)
    write(name, json.dumps(value))
