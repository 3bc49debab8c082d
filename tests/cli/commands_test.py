"""What the commands print and write: text, JSON keys, files, interrupts."""
import json
import os
import signal
import subprocess
import tempfile
import time

import cli_lib
from cli_lib import run, vesper

PROMPT = "It was a cold morning, and the road to the village was empty."
TOTALS = ("decode_steps", "sparse_layer_steps", "dense_layer_steps", "bytes_read", "bytes_dense",
          "bytes_ratio", "bytes_ratio_sparse_layers", "candidates_mean", "kept_mean", "union_mean",
          "estimated_mass_mean")
# Sparse from the first layer on, whatever this machine's crossover.
SPARSE = ("--attention", "adaptive", "--dense-below", 0, "--dense-layers", 0, "--min-candidates", 64, "--min-tokens", 8)


class Commands(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name):
        return os.path.join(self.folder, name)

    def generate(self, *flags):
        return ("generate", "--model", vesper(), "--prompt", PROMPT, *flags)

    def check_totals(self, totals):
        for key in TOTALS:
            self.assertIn(key, totals)
        self.assertLessEqual(totals["bytes_ratio"], 1)
        self.assertGreater(totals["bytes_dense"], 0)

    def test_info(self):
        text = self.run_ok("info", "--model", vesper()).out
        for part in ("version", "device", "presets", "quest:K", "LlamaForCausalLM", "layers"):
            self.assertIn(part, text)
        report = self.run_json("info", "--model", vesper())
        self.assertEqual(report["presets"], ["dense", "adaptive", "paper", "paper-full", "quest:K",
                                             "streaming"])
        model = report["model"]
        self.assertEqual((model["layers"], model["query_heads"], model["kv_heads"]), (8, 8, 2))
        self.assertEqual(model["max_context"], 32768)
        # bf16 K and V of 2 heads of 128 in 8 layers.
        self.assertEqual(model["kv_bytes_per_token"], 8 * 2 * 2 * 128 * 2)
        self.assertGreater(model["kv_and_index_bytes_per_token"], model["kv_bytes_per_token"])
        self.assertNotIn("model", self.run_json("info"))
        for isa in ("scalar", "auto"):
            self.assertIn("cpu", self.run_json("info", "--isa", isa, "--threads", 1)["device"])
        self.assertIn("ref", self.run_json("info", "--device", "ref")["device"])

    def test_generate_chat(self):
        chat = self.generate("--max-tokens", 4, "--chat")
        refused = run(*chat)
        self.assertNotEqual(refused.code, 0)
        self.assertIn("[chat template] no template", refused.err)
        plain = self.run_json(*self.generate("--max-tokens", 4))
        report = self.run_json(*chat, "--system", "Be brief.", "--chat-template", "zephyr")
        self.assertGreater(report["prompt_tokens"], plain["prompt_tokens"])
        self.assertEqual(len(report["tokens"]), report["generated_tokens"])
        self.assertIn("accepted chatml", run(*chat, "--chat-template", "alpaca").err)
        self.assertNotEqual(run(*self.generate("--system", "alone")).code, 0)

    def test_generate_text(self):
        flags = self.generate("--max-tokens", 12, *SPARSE)
        result = self.run_ok(*flags)
        self.assertTrue(result.out.endswith("\n"))
        self.assertGreater(len(result.out), 5)
        summary = result.err.split("\n")
        self.assertEqual(len(summary), 2)
        self.assertRegex(summary[0], r"new tokens .*dense KV bytes read")
        report = self.run_json(*flags)
        self.assertEqual(report["text"] + "\n", result.out)
        for key in ("model", "device", "policy", "prompt_tokens", "generated_tokens",
                    "finish_reason", "prefill_seconds", "prefill_tokens_per_second",
                    "decode_seconds", "decode_tokens_per_second", "attention", "text", "tokens"):
            self.assertIn(key, report)
        self.assertEqual(report["generated_tokens"], 12)
        self.assertEqual(len(report["tokens"]), 12)
        self.assertEqual(report["finish_reason"], "length")
        self.check_totals(report["attention"])
        self.assertEqual(report["attention"]["decode_steps"], 11)
        self.assertEqual(report["policy"]["name"], "adaptive")

    def test_threads_and_prompt_file_do_not_change_the_tokens(self):
        name = cli_lib.write(self.file("prompt.txt"), PROMPT)
        base = ("--max-tokens", 10, "--temperature", "0.8", "--seed", 5, *SPARSE)
        tokens = [self.run_json(*self.generate(*base, "--threads", n))["tokens"] for n in (1, 3)]
        tokens.append(self.run_json("generate", "--model", vesper(), "--prompt-file", name,
                                    *base)["tokens"])
        self.assertEqual(tokens[0], tokens[1])
        self.assertEqual(tokens[0], tokens[2])
        other = self.run_json(*self.generate(*base[:4], "--seed", 6, *SPARSE))["tokens"]
        self.assertNotEqual(tokens[0], other)

    def test_streams_while_it_works(self):
        with subprocess.Popen([cli_lib.PROGRAM, *map(str, self.generate("--max-tokens", 3000,
                                                                        "--ignore-eos"))],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            first = process.stdout.read(1)  # arrives long before the end
            self.assertTrue(first)
            self.assertIsNone(process.poll())
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 130)

    def test_no_tokens_asked_for(self):
        report = self.run_json(*self.generate("--max-tokens", 0))
        self.assertEqual((report["tokens"], report["text"]), ([], ""))

    def test_stats_file(self):
        name = self.file("stats.json")
        self.run_ok(*self.generate("--max-tokens", 4, "--stats", name, *SPARSE))
        with open(name, encoding="utf-8") as file:
            content = file.read()
        report = json.loads(content)
        self.check_totals(report["attention"])
        self.assertEqual(len(report["steps"]), 3)
        for step in report["steps"]:
            self.assertEqual([entry["layer"] for entry in step], list(range(8)))
            for entry in step:
                self.assertIn(entry["path"], ("sparse", "short", "all forced"))
                self.assertEqual(len(entry["kept"]), 8)
                self.assertEqual(len(entry["union"]), 2)
                self.assertEqual(len(entry["candidates"]), 2)
                self.assertEqual(len(entry["estimated_mass"]), 8)
                self.assertLessEqual(max(entry["union"]), entry["tokens"])
        total = sum(entry["bytes_read"] for step in report["steps"] for entry in step)
        self.assertEqual(total, report["attention"]["bytes_read"])
        # Never overwritten unasked.
        before = os.stat(name)
        self.check_refused(2, ("[output]", "exists", name, "--force"),
                           *self.generate("--max-tokens", 4, "--stats", name))
        with open(name, encoding="utf-8") as file:
            self.assertEqual(file.read(), content)
        self.assertEqual(os.stat(name).st_mtime_ns, before.st_mtime_ns)
        self.run_ok(*self.generate("--max-tokens", 2, "--stats", name, "--force"))
        with open(name, encoding="utf-8") as file:
            self.assertEqual(len(json.load(file)["steps"]), 1)
        self.assertEqual(os.listdir(self.folder), ["stats.json"])

    def test_files_that_cannot_be_written(self):
        for command in (self.generate("--max-tokens", 2, "--stats"),
                        ("eval", "ppl", "--ctx", 64, "--last", 2, "--out")):
            name = self.file("none/stats.json")
            self.check_refused(1, ("[output]", "cannot write", name), *command, name)
            self.check_refused(1, ("[output]", self.folder, "directory"), *command, self.folder,
                               "--force")
            if os.geteuid() != 0:
                os.chmod(self.folder, 0o500)
                name = self.file("x.json")
                self.check_refused(1, ("[output]", name, "Permission denied"), *command, name)
                os.chmod(self.folder, 0o700)
        self.assertEqual(os.listdir(self.folder), [])

    def test_standard_output_that_is_full(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        for flags in ((), ("--json",)):
            with open("/dev/full", "wb") as full:
                process = subprocess.run([cli_lib.PROGRAM, "info", *flags], stdout=full,
                                         stderr=subprocess.PIPE, timeout=60, check=False)
            self.assertEqual(process.returncode, 1)
            self.assertEqual(process.stderr,
                             b"twilight: [output] cannot write all of standard output\n")

    def test_a_failed_run_leaves_no_file(self):
        name = self.file("stats.json")
        self.check_refused(2, ("page_size",), *self.generate("--stats", name, "--page-size", 0,
                                                           "--attention", "adaptive"))
        self.assertEqual(os.listdir(self.folder), [])

    def test_demo(self):
        demo = ("demo", "--ctx", 1024, "--dense-below", 0, "--seed", 3, "--tokens", 12,
                "--attention", "adaptive")
        report = self.run_json(*demo, codes=(0, 1))
        for key in ("model", "text", "device", "seed", "prompt_tokens", "depth", "fact",
                    "prefill_seconds", "dense", "sparse", "decode_speedup"):
            self.assertIn(key, report)
        self.assertEqual(report["seed"], 3)
        self.assertLessEqual(report["prompt_tokens"], 1024)
        for part in ("dense", "sparse"):
            for key in ("policy", "answer", "found", "decode_tokens_per_second", "attention",
                        "kept_per_layer"):
                self.assertIn(key, report[part])
            self.check_totals(report[part]["attention"])
            self.assertEqual(len(report[part]["kept_per_layer"]), 8)
        self.assertEqual(report["dense"]["attention"]["bytes_ratio"], 1)
        self.assertGreater(report["sparse"]["attention"]["sparse_layer_steps"], 0)
        self.assertTrue(report["dense"]["found"])
        self.assertIn(report["dense"]["answer"].strip(" ."), report["fact"])
        text = run(*demo)
        self.assertEqual(text.code, 0 if report["sparse"]["found"] else 1)
        self.check_text(text.out, report["fact"])
        self.assertEqual(text.err, "")

    def check_text(self, text, fact):
        self.assertNotIn(cli_lib.ESCAPE, text)
        for part in (fact, "answer", "correct", "KV bytes read"):
            self.assertIn(part, text)

    def test_interrupt_keeps_what_was_generated(self):
        stats = self.file("stats.json")
        command = self.generate("--max-tokens", 100000, "--ignore-eos", "--stats", stats, *SPARSE)
        for extra in ((), ("--json",)):
            # More than the context has room for is cut, so this runs for minutes if left alone.
            with subprocess.Popen([cli_lib.PROGRAM, *map(str, command + extra + ("--force",))],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                if extra:
                    time.sleep(1.5)
                else:
                    process.stdout.read(1)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 130, err)
            if extra:
                report = json.loads(out)
                self.assertEqual(report["finish_reason"], "cancelled")
                self.assertEqual(len(report["tokens"]), report["generated_tokens"])
                self.assertGreater(report["generated_tokens"], 0)
                self.assertEqual(err, b"")
            else:
                self.assertTrue(out.decode("utf-8").endswith("\n"))
                self.assertIn("cancelled", err.decode("utf-8"))
            with open(stats, encoding="utf-8") as file:
                report = json.load(file)
            self.assertEqual(len(report["steps"]), report["attention"]["decode_steps"])
