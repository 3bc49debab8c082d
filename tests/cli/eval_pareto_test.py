"""pareto, calibrate, and profiles."""
import json
import os
import tempfile
import xml.etree.ElementTree as ElementTree

import cli_lib
from cli_lib import vesper, write

SMALL = ("--dense-layers", 0, "--min-candidates", 64, "--min-tokens", 8)


class ParetoAndCalibrate(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name):
        return os.path.join(self.folder, name)

    def load(self, name):
        with open(name, encoding="utf-8") as file:
            return json.load(file)

    def test_pareto(self):
        picture = self.file("p.svg")
        flags = ("pareto", "--ctx", 600, "--last", 32, "--attention", "paper,quest:64", "--ps",
                 "0.6,0.95", "--fractions", "0.25,0.5", *SMALL, "--out")
        result = self.run_ok(*flags, picture)
        self.assertEqual(sorted(os.listdir(self.folder)), ["p.json", "p.svg"])
        data = self.load(self.file("p.json"))
        labels = [r["attention"] for r in data["results"]]
        self.assertEqual(labels, ["dense", "paper p 0.600, candidates 0.250",
                                  "paper p 0.600, candidates 0.500",
                                  "paper p 0.950, candidates 0.250",
                                  "paper p 0.950, candidates 0.500", "quest:64"])
        points = data["results"][1:]
        self.assertEqual([p["paper_point"] for p in points], [False, False, True, True, False])
        front = [p for p in points if p["on_front"]]
        self.assertTrue(front)
        for point in points:
            better = [q for q in points if q["bytes_ratio_sparse_layers"] <
                      point["bytes_ratio_sparse_layers"] and q["loss"] <= point["loss"]]
            self.assertEqual(point["on_front"], not better)
            self.assertIn(point["attention"], result.out)
        tree = ElementTree.parse(picture)
        text = " ".join(tree.getroot().itertext())
        for part in ("dense: ppl", "share of dense", "perplexity over dense", "paper p 0.950",
                     "front"):
            self.assertIn(part, text)
        circles = [e for e in tree.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
        self.assertEqual(len(circles), 5)  # each with a tooltip
        # Neither file is replaced unasked.
        os.remove(picture)
        self.check_refused(2, ("[output]", "exists", "p.json"), *flags, picture)
        self.assertEqual(os.listdir(self.folder), ["p.json"])

    def test_pareto_of_a_task(self):
        page = self.file("page.html")
        report = self.run_json("pareto", "--task", "passkey", "--ctx", 500, "--depths", "0.5",
                               "--trials", 1, "--attention", "streaming,quest:64", *SMALL,
                               "--resume", self.file("run"), "--out", page)
        self.assertEqual(report["results"][1]["loss"], 1)
        self.assertEqual(report, self.load(self.file("page.json")))
        ElementTree.parse(page)
        with open(self.file("run"), encoding="utf-8") as file:
            self.assertEqual(len(file.readlines()), 4)
        for out, parts in (("x.png", ("[--out]", "x.png", ".html or .svg")),
                           ("none/x.svg", ("[output]", "none/x.svg"))):
            code = 2 if out == "x.png" else 1
            self.check_refused(code, parts, "pareto", "--out", self.file(out))
        self.check_refused(2, ("--out", "required"), "pareto")

    def test_calibrate_and_profile(self):
        name = self.file("profile.json")
        flags = ("calibrate", "--ctx", 700, "--last", 64, "--attention", "paper-full", "--target-ppl",
                 "8%", *SMALL)
        report = self.run_json(*flags, "--out", name)
        tried = {round(t["p"], 3): t for t in report["tried"]}
        self.assertIn(0.85, tried)
        p = round(report["proposed"]["p"], 3)
        self.assertIn(p, tried)
        bytes_read = [tried[key]["bytes_ratio"] for key in sorted(tried)]
        self.assertEqual(bytes_read, sorted(bytes_read))
        for trial in (*report["tried"], report["held_out"]):
            for key in ("ppl", "ppl_change", "ppl_change_half_width", "divergence", "kept_mean",
                        "true_mass_mean", "bytes_ratio", "milliseconds_per_token"):
                self.assertIn(key, trial)
            self.assertGreaterEqual(trial["divergence"], 0)
        self.assertIn("p by layer", report["layers"])
        profile = self.load(name)
        self.assertEqual(profile["format"], "twilight profile 1")
        self.assertEqual(profile["policy"]["p"], p)
        self.assertEqual(profile["policy"]["dense_layers"], 0)
        self.check_refused(2, ("[output]", "exists", name), *flags, "--out", name)
        text = self.run_ok(*flags, "--no-layers")
        for part in ("Proposed: paper-full with p", "Too high: p", "Held out: ", "true mass", "dense"):
            self.assertIn(part, text.out)
        # The policy is what commands then run.
        use = ("--profile", name, "--dense-below", 0)
        report = self.run_json("generate", "--model", vesper(), "--prompt", "It was " * 100,
                               "--max-tokens", 4, *use)
        self.assertEqual(report["policy"]["name"], "profile")
        self.assertAlmostEqual(report["policy"]["p"], p, places=6)
        self.assertGreater(report["telemetry"]["sparse_layer_steps"], 0)
        report = self.run_json("eval", "ppl", "--ctx", 300, "--last", 4, *use)
        self.assertEqual(report["attention"], "profile")
        report = self.run_json("eval", "ppl", "--ctx", 300, "--last", 4, "--attention",
                               "dense,profile", *use)
        self.assertEqual(len(report["results"]), 2)
        self.check_refused(2, ("[--profile]", "'profile'"), "eval", "ppl", "--attention", "paper",
                           "--profile", name)
        self.check_refused(2, ("--attention", "--profile"), "generate", "--model", vesper(),
                           "--prompt", "x", "--attention", "paper", "--profile", name)

    def test_calibrate_finds_dense_layers(self):
        flags = ("calibrate", "--ctx", 700, "--last", 64, "--attention", "paper", "--target-ppl",
                 "40%", "--no-layers", *SMALL[2:])
        report = self.run_json(*flags, "--out", self.file("fewer.json"))
        tried = report["tried_dense_layers"]
        # A target this wide is kept without any dense layer, and then nothing else is tried.
        self.assertEqual([t["dense_layers"] for t in tried], [0])
        self.assertEqual(report["proposed"]["dense_layers"], 0)
        self.assertEqual(report["held_out"]["dense_layers"], 0)
        self.assertLess(tried[0]["bytes_ratio"], report["tried"][0]["bytes_ratio"])
        self.assertEqual(self.load(self.file("fewer.json"))["policy"]["dense_layers"], 0)
        text = self.run_ok(*flags)
        self.assertRegex(text.out, r"0\.\d+, dense layers 0 \* ")
        self.assertIn("dense layers 0\n", text.out)
        # A number given stays.
        report = self.run_json(*flags, "--dense-layers", 1)
        self.assertNotIn("tried_dense_layers", report)
        self.assertEqual(report["proposed"]["dense_layers"], 1)

    def test_label_channels(self):
        name = self.file("labels.json")
        flags = ("calibrate", "--labels", "--label-channels", 16, "--ctx", 300, "--last", 16,
                 "--attention", "paper", "--dense-layers", 0)
        report = self.run_json(*flags, "--out", name)
        profile = self.load(name)
        model = profile["model"]
        self.assertEqual(report["label_channels"], 16)
        self.assertGreater(report["share"], 16 / model["head_dim"])
        self.assertLess(report["share"], 1)
        labels = profile["policy"]["labels"]
        self.assertEqual(labels, report["labels"])
        self.assertEqual(len(labels), model["layers"] * model["kv_heads"] * 16)
        for row in range(0, len(labels), 16):
            head = labels[row:row + 16]
            self.assertEqual(head, sorted(set(head)))
            self.assertTrue(0 <= head[0] and head[-1] < model["head_dim"])
        self.assertEqual(profile["policy"]["selector"], "double_sparsity")
        self.assertIn("16 of ", self.run_ok(*flags).out)
        report = self.run_json("eval", "ppl", "--ctx", 600, "--last", 4, "--attention",
                               "dense,profile", "--profile", name, "--dense-below", 0,
                               "--min-candidates", 64)
        self.assertEqual(len(report["results"]), 2)
        # One layer takes its own channels.
        bench = ("bench", "op", "--ctx", 400, "--repeats", 1, "--min-candidates", 64, "--attention",
                 "paper,profile", "--profile", name)

        def choice(channels):
            changed = {**profile, "policy": {**profile["policy"], "labels": channels}}
            file = write(self.file("changed.json"), json.dumps(changed))
            report = self.run_json(*bench[:-1], file, "--from-model", vesper(), "--layer", 3)
            result = report["results"][-1]
            self.assertEqual(result["policy"]["selector"], "double_sparsity")
            return result["candidates"], result["estimated_mass"], result["true_mass"]

        mine, plain = slice(3 * 32, 4 * 32), [*range(16)] * (len(labels) // 16)
        only_mine = plain[:]
        only_mine[mine] = labels[mine]
        self.assertEqual(choice(only_mine), choice(labels))
        self.assertNotEqual(choice(plain), choice(labels))
        self.check_refused(2, ("[bench]", "planted keys", "--from-model"), *bench)
        self.check_refused(2, ("[bench]", "--layer, got 8"), *bench, "--from-model", vesper(),
                           "--layer", 8)
        self.check_refused(2, ("double_sparsity without label channels", "calibrate --labels"),
                           "eval", "ppl", "--attention", "paper", "--selector", "double_sparsity")
        self.check_refused(2, ("[--label-channels]", "got 24", "multiples of 16"), "calibrate",
                           "--labels", "--label-channels", 24)
        self.check_refused(2, ("[calibrate]", "--labels, got dense"), "calibrate", "--labels",
                           "--attention", "dense")
        profile["policy"]["labels"] = labels[:16]
        path = write(self.file("short.json"), json.dumps(profile))
        self.check_refused(2, ("[--profile]", "policy.labels, got 16", "accepted"), "generate",
                           "--model", vesper(), "--prompt", "x", "--profile", path)

    def test_bad_profiles(self):
        name = self.file("profile.json")
        self.run_ok("calibrate", "--ctx", 300, "--last", 16, "--attention", "paper-full",
                    "--target-ppl", "100%", "--no-layers", *SMALL, "--out", name)
        good = self.load(name)
        generate = ("generate", "--model", vesper(), "--prompt", "x", "--profile")

        def refused(parts, change):
            profile = json.loads(json.dumps(good))
            change(profile)
            path = write(self.file("bad.json"), json.dumps(profile))
            self.check_refused(2, ("[--profile]", *parts), *generate, path)

        refused(("policy.fancy", "no such field"), lambda f: f["policy"].update(fancy=1))
        refused(("policy.p", "got \"much\""), lambda f: f["policy"].update(p="much"))
        refused(("p, got 2", "accepted above 0 to 1"), lambda f: f["policy"].update(p=2))
        refused(("field tail", "got nothing"), lambda f: f["policy"].pop("tail"))
        refused(("layers 8", "accepted 9"), lambda f: f["model"].update(layers=9))
        # Tokens a page are the profile's, unless another number is asked for.
        paged = self.file("paged.json")
        write(paged, json.dumps({**good, "page_size": 32}))
        self.run_ok(*generate, paged, "--max-tokens", 2)
        self.check_refused(2, ("[--profile]", "page size", "--page-size 16", "accepted 32"),
                           *generate, paged, "--page-size", 16)
        refused(("page_size", "got 0", "accepted 1 to 256"), lambda f: f.update(page_size=0))
        refused(("format",), lambda f: f.update(format="other"))
        self.check_refused(2, ("[--profile]", "format"), *generate,
                           write(self.file("text"), "no JSON"))
        self.check_refused(1, ("[open]", "missing"), *generate, self.file("missing"))

    def test_calibrate_refuses(self):
        for parts, *flags in (
                (("[calibrate]", "'dense'", "prunes by p"), "--attention", "dense"),
                (("[calibrate]", "'quest:64'", "prunes by p"), "--attention", "quest:64"),
                (("--attn-p", "what calibrate finds"), "--attn-p", "0.9"),
                (("[--target-ppl]", "'much'", "e.g. 0.5%"), "--target-ppl", "much"),
                (("[--target-ppl]", "'0%'"), "--target-ppl", "0%"),
                (("[calibrate]", "--last, got 64", "accepted 1 to 24"), "--ctx", 64, "--last", 64),
                (("[calibrate]", "too short", "accepted at least"), "--text",
                 write(self.file("short"), "one line\n"))):
            with self.subTest(flags):
                self.check_refused(2, parts, "calibrate", *flags)
        # Too few candidates for any p.
        self.check_refused(1, ("[calibrate]", "no p keeps", "raise --candidates"), "calibrate",
                           "--ctx", 600, "--last", 64, "--attention", "paper", "--candidates", 16,
                           "--sinks", 1, "--recent", 1, "--dense-layers", 0, "--target-ppl",
                           "0.001%", "--no-layers")
