"""Evaluations: what they print and write, how they go on after a cut, what they refuse."""
import json
import os
import signal
import subprocess
import tempfile
import time

import cli_lib
from cli_lib import write

METRICS = ("ppl", "tokens", "found", "trials", "bytes_ratio", "bytes_ratio_sparse_layers",
           "kept_mean", "union_mean", "true_mass_mean", "telemetry", "policy", "grid")
# Sparse from the first layer on, whatever this machine's crossover.
SPARSE = ("--dense-below", 0, "--dense-layers", 0, "--min-candidates", 64, "--min-tokens", 8)


class Eval(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name):
        return os.path.join(self.folder, name)

    def check_result(self, result):
        for key in METRICS:
            self.assertIn(key, result)
        telemetry = result["telemetry"]
        counted = telemetry["sparse_layer_steps"] + sum(telemetry["dense_layer_steps"].values())
        self.assertEqual(counted, 8 * telemetry["steps"])
        self.assertEqual(telemetry["sparse_layer_steps"], result["sparse_layer_steps"])

    def test_ppl(self):
        out = self.file("report.json")
        report = self.run_json("eval", "ppl", "--ctx", 600, "--last", 48, "--attention",
                               "dense,paper", *SPARSE, "--out", out)
        with open(out, encoding="utf-8") as file:
            self.assertEqual(json.load(file), report)
        self.assertEqual([r["attention"] for r in report["results"]], ["dense", "paper"])
        dense, paper = report["results"]
        for result in (dense, paper):
            self.check_result(result)
            self.assertEqual(result["tokens"], 48)
            self.assertGreater(result["ppl"], 1)
        self.assertEqual((dense["bytes_ratio"], dense["true_mass_mean"]), (1, 1))
        self.assertEqual(dense["telemetry"]["dense_layer_steps"], {"policy": 48 * 8})
        self.assertLess(paper["bytes_ratio"], 1)
        self.assertGreater(paper["true_mass_mean"], 0.5)
        self.assertEqual(paper["telemetry"]["audited_steps"], 6)  # one in eight
        self.assertAlmostEqual(paper["ppl_change"], paper["ppl"] / dense["ppl"] - 1, places=9)
        self.assertGreater(paper["ppl_change_half_width"], 0)
        self.assertNotIn("ppl_change", dense)
        self.check_refused(2, ("[output]", "exists", out), "eval", "ppl", "--ctx", 64, "--last", 2,
                           "--out", out)

    def test_ppl_of_one_preset(self):
        single = self.run_json("eval", "ppl", "--ctx", 300, "--last", 4, *SPARSE, "--no-audit")
        self.check_result(single)  # of the only result, at the top too
        self.assertIsNone(single["true_mass_mean"])
        self.assertEqual(single["telemetry"]["audited_steps"], 0)
        table = self.run_ok("eval", "ppl", "--ctx", 300, "--last", 4, *SPARSE, "--audit-every", 1)
        self.assertEqual(len(table.out.strip().split("\n")), 2)
        self.assertEqual(len(table.err.strip().split("\n")), 1)
        self.assertRegex(table.err, r"^adaptive: 32 of 32 layer steps sparse; true mass .*4 of 4")

    def test_what_stayed_dense_is_told(self):
        table = self.run_ok("eval", "ppl", "--ctx", 300, "--last", 4, "--no-audit",
                            "--dense-below", 5000)
        self.assertIn("adaptive: 0 of 32 layer steps sparse", table.err)
        self.assertIn("8 dense: dense layer", table.err)
        self.assertIn("24 dense: short", table.err)
        self.assertIn("estimates not audited", table.err)
        self.assertIn("WARNING: nothing ran sparse", table.err)
        report = self.run_json("eval", "ppl", "--ctx", 300, "--last", 4, "--no-audit",
                               "--dense-below", 5000)
        self.assertEqual(report["warnings"], ["adaptive: nothing ran sparse"])
        report = self.run_json("eval", "ppl", "--ctx", 600, "--last", 4, "--dense-below", 0,
                               "--candidates", "0.5", "--min-candidates", 16, "--max-candidates",
                               64)
        self.assertEqual(report["telemetry"]["cap_hits"], 24)
        self.assertIn("candidate cap of 64 tokens hit in 100.0 %", report["warnings"][0])

    def test_texts_and_contexts(self):
        other = write(self.file("other.txt"), "A quite different text, told again. " * 200)
        report = self.run_json("eval", "ppl", "--ctx", "200,400", "--last", 16, "--attention",
                               "dense", "--no-audit", "--text", other, "--text",
                               cli_lib.path("data", "Persuasion.txt"))
        grid = report["results"][0]["grid"]
        self.assertEqual([(g["text"] == other, g["ctx"]) for g in grid],
                         [(True, 200), (True, 400), (False, 200), (False, 400)])
        self.assertEqual(report["scored_tokens"], 64)
        self.assertLess(grid[1]["ppl"], grid[3]["ppl"])  # the repeated one is easy
        # A part of a grid is what a run of it alone gives.
        alone = self.run_json("eval", "ppl", "--ctx", 400, "--last", 16, "--attention", "dense",
                              "--no-audit", "--text", other)
        self.assertEqual(alone["ppl"], grid[1]["ppl"])

    def test_passkey(self):
        flags = ("eval", "passkey", "--ctx", 512, "--depths", "0.2,0.8", "--trials", 1, *SPARSE)
        report = self.run_json(*flags)
        self.check_result(report)
        for key in ("seed", "found_per_depth", "results", "score", "half_width"):
            self.assertIn(key, report)
        self.assertEqual(report["trials"], 2)
        self.assertEqual(report["found"], sum(d["found"] for d in report["found_per_depth"]))
        self.assertEqual([d["depth"] for d in report["found_per_depth"]], [0.2, 0.8])
        self.assertIsNone(report["ppl"])
        self.assertEqual(self.run_json(*flags), report)  # the seed is fixed
        self.assertEqual(self.run_json(*flags, "--threads", 1)["results"], report["results"])

    def test_needles(self):
        report = self.run_json("eval", "niah", "--ctx", 700, "--keys", 3, "--queries", 2,
                               "--depths", "0.5", "--trials", 2, "--attention", "dense,paper",
                               *SPARSE)
        dense, paper = report["results"]
        self.assertEqual((report["keys"], report["values"], report["queries"]), (3, 1, 2))
        self.assertEqual(dense["questions"], 4)
        self.assertGreaterEqual(dense["score"], 0.75)
        self.assertGreater(dense["half_width"], 0)
        self.assertAlmostEqual(paper["score_change"], paper["score"] - dense["score"])
        self.assertGreater(paper["score_change_half_width"], 0)
        self.assertIn("same_answers", paper)
        # The window alone cannot know what stands in the middle.
        blind = self.run_json("eval", "niah", "--ctx", 1500, "--depths", "0.5", "--trials", 2,
                              "--attention", "streaming", "--dense-below", 0, "--dense-layers", 0)
        self.assertEqual(blind["score"], 0)
        values = self.run_json("eval", "niah", "--ctx", 700, "--values", 2, "--depths", "0.3",
                               "--trials", 2, "--attention", "dense", "--dense-question")
        self.assertGreaterEqual(values["score"], 0.5)
        self.assertLess(values["tokens"], dense["tokens"])  # only the answer was decoded

    def test_the_other_tasks(self):
        for task, flags in (("vt", ("--hops", 2)), ("cwe", ("--common", 5)), ("fwe", ()),
                            ("cwe", ("--answer", "text", "--common", 2)),
                            ("recall", ("--facts", 2, "--last", 20))):
            with self.subTest(task):
                report = self.run_json("eval", task, "--ctx", 700, "--trials", 2, "--attention",
                                       "dense,paper", *SPARSE, *flags)
                self.assertEqual(report["task"], task)
                for result in report["results"]:
                    self.check_result(result)
                    self.assertEqual(result["trials"], 2)
                    self.assertTrue(0 <= result["score"] <= 1)
                    if task == "recall":
                        self.assertEqual(result["digits"], 2 * 2 * 7)
                        self.assertEqual(result["score"],
                                         result["digits_right"] / result["digits"])
                        self.assertEqual(result["scored_tokens"], 40)
                        self.assertGreater(result["ppl"], 1)
        self.assertGreaterEqual(report["results"][0]["digits_right"], 24)

    def test_resume_gives_what_one_run_gives(self):
        name = self.file("run.jsonl")
        flags = ("eval", "passkey", "--ctx", "400,600", "--depths", "0.3,0.7", "--trials", 3,
                 "--attention", "dense,paper", *SPARSE)
        whole = self.run_json(*flags)
        with subprocess.Popen([cli_lib.PROGRAM, *map(str, flags), "--resume", name],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                if os.path.exists(name):
                    with open(name, "rb") as file:
                        if file.read().count(b"\n") >= 4:
                            break
                time.sleep(0.02)
            self.assertIsNone(process.poll(), "killed too late")
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
        with open(name, "rb") as file:
            lines = file.read().split(b"\n")
        self.assertTrue(4 <= len(lines) - 1 < 1 + 2 * 2 * 3 * 2)
        before = lines[:-1]
        with open(name, "ab") as file:
            file.write(b'{"key":"half a li')  # as a kill while writing would leave it
        self.assertEqual(self.run_json(*flags, "--resume", name), whole)
        with open(name, "rb") as file:
            lines = file.read().split(b"\n")
        self.assertEqual(lines[:len(before)], before)  # nothing was measured twice
        self.assertEqual(len(lines) - 1, 1 + 2 * 2 * 3 * 2)
        # A finished file is read alone; more trials go on from it.
        stamp = os.stat(name).st_size
        self.assertEqual(self.run_json(*flags, "--resume", name), whole)
        self.assertEqual(os.stat(name).st_size, stamp)
        more = [4 if f == 3 else f for f in flags]
        self.assertEqual(self.run_json(*more, "--resume", name)["results"][0]["trials"], 16)
        self.assertGreater(os.stat(name).st_size, stamp)

    def test_resume_refuses_other_settings(self):
        name = self.file("run.jsonl")
        flags = ("eval", "ppl", "--ctx", 200, "--last", 4, "--no-audit", *SPARSE)
        self.run_ok(*flags, "--resume", name)
        with open(name, "rb") as file:
            content = file.read()
        other = write(self.file("other.txt"), "Another text. " * 200)
        for changed, parts in (
                (("--attn-p", "0.9"), ("policy of adaptive.p, got 0.9, accepted 0.85 as in",)),
                (("--attention", "dense"), ("presets", '["dense"]', '["adaptive"]')),
                (("--text", other), ("texts", "as in the file")),
                (("--page-size", "32"), ("page_size, got 32, accepted 16",))):
            with self.subTest(changed):
                self.check_refused(2, ("[--resume]", name, *parts), *flags, *changed, "--resume",
                                   name)
        self.check_refused(2, ("[--resume]", name, "last, got 5, accepted 4"), "eval", "ppl",
                           "--ctx", 200, "--last", 5, "--no-audit", *SPARSE, "--resume", name)
        with open(name, "rb") as file:
            self.assertEqual(file.read(), content)
        self.check_refused(2, ("[--resume]", "kind of file", other), *flags, "--resume", other)
        self.check_refused(1, ("[--resume]", "cannot open", "none/x"), *flags, "--resume",
                           self.file("none/x"))

    def test_interrupt_tells_how_to_go_on(self):
        name = self.file("run.jsonl")
        with subprocess.Popen([cli_lib.PROGRAM, "eval", "passkey", "--ctx", "600", "--trials",
                               "1000", "--resume", name], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not (os.path.exists(name) and
                                                       os.stat(name).st_size > 0):
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out), (130, b""))
        self.assertIn(b"goes on from " + name.encode(), err)

    def test_bad_flags(self):
        for parts, *flags in (
                (("[--queries]", "got 3", "accepted 1 to --keys 2"), "niah", "--keys", 2,
                 "--queries", 3),
                (("[--keys]", "got 10000", "accepted 1 to"), "niah", "--keys", 10000),
                (("[--chains]", "got 9 chains of 5", "accepted up to"), "vt", "--chains", 9),
                (("[eval]", "context", "accepted at least"), "niah", "--ctx", 40),
                (("[eval]", "context", "too few"), "fwe", "--ctx", 60),
                (("[--last]", "got 600", "accepted 0 to"), "recall", "--ctx", 600, "--last", 600),
                (("--answer", "guess"), "cwe", "--answer", "guess"),
                (("--audit-every", "-1"), "vt", "--audit-every", -1),
                (("[eval]", "named twice", "'paper'"), "ppl", "--attention", "paper,paper"),
                (("[eval]", "text is empty", "accepted at least one"), "ppl", "--text",
                 write(self.file("empty"), "")),
                (("[eval]", "too few distinct words"), "cwe", "--text",
                 write(self.file("few"), "word after word after word\n"))):
            with self.subTest(flags):
                self.check_refused(2, parts, "eval", *flags)
