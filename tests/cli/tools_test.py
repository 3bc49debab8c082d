"""inspect and bench at small sizes."""
import json
import os
import tempfile
import xml.etree.ElementTree as ElementTree

import cli_lib

SPARSE = ("--dense-layers", 0, "--min-candidates", 64, "--min-tokens", 8)


class Tools(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name):
        return os.path.join(self.folder, name)

    def test_inspect(self):
        flags = ("inspect", "--ctx", 500, "--tokens", 10, "--fact-seed", 2, *SPARSE)
        for name in ("page.html", "picture.svg"):
            out = self.file(name)
            result = self.run_ok(*flags, "--out", out)
            self.assertIn(out, result.err)
            text = " ".join(ElementTree.parse(out).getroot().itertext())
            self.assertIn("layer", text.lower())
            self.check_refused(2, ("[output]", "exists", out), *flags, "--out", out)
        self.run_ok(*flags, "--out", out, "--force")
        report = self.run_json(*flags, "--audit")
        self.assertEqual(report["generated_tokens"], 10)
        self.assertEqual(len(report["step_tokens"]), 9)
        self.assertEqual(len(report["layers"]), 8)
        self.assertEqual(report["attention"]["sparse_layer_steps"], 9 * 8)
        self.assertIn("true_mass_mean", report["attention"])
        self.assertIn("What is the special magic number", report["question"])

    def test_inspect_refuses(self):
        self.check_refused(2, ("[--out]", "accepted --out FILE.html"), "inspect")
        self.check_refused(2, ("[--out]", "x.png", ".html or .svg"), "inspect", "--out", "x.png")
        self.check_refused(2, ("--prompt", "--ctx"), "inspect", "--prompt", "x", "--ctx", 100,
                           "--json")

    def test_bench_op(self):
        out = self.file("op.json")
        flags = ("bench", "op", "--ctx", 1024, "--heads", 4, "--kv-heads", 2, "--head-dim", 64,
                 "--attention", "paper,adaptive,quest:256", "--repeats", 2, *SPARSE[2:])
        report = self.run_json(*flags, "--out", out)
        with open(out, encoding="utf-8") as file:
            self.assertEqual(json.load(file), report)
        text = json.dumps(report)
        for part in ("dense", "paper", "quest:256"):
            self.assertIn('"' + part + '"', text)
        table = self.run_ok(*flags)
        for part in ("dense", "paper", "quest:256"):
            self.assertIn(part, table.out)
        self.check_refused(2, ("[output]", "exists", out), *flags, "--out", out)
        self.check_refused(2, ("--ctx", "10"), "bench", "op", "--ctx", 10)

    def test_bench_decode(self):
        flags = ("bench", "decode", "--ctx", 600, "--tokens", 4, "--attention", "paper",
                 "--dense-below", 0, *SPARSE)
        text = json.dumps(self.run_json(*flags))
        for part in ('"dense"', '"paper"'):
            self.assertIn(part, text)
        table = self.run_ok(*flags)
        self.assertIn("paper", table.out)
        self.check_refused(2, ("[bench]", "accepted at least --ctx"), "bench", "decode", "--ctx",
                           30000, "--text", cli_lib.write(self.file("short"), "one line\n"))
