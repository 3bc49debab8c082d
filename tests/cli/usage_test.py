"""Bad flags and arguments: exit status, and what the one line on standard error says."""
import os
import tempfile

import cli_lib
from cli_lib import vesper, write

COMMANDS = (("demo",), ("generate",), ("eval",), ("eval", "ppl"), ("eval", "passkey"),
            ("eval", "niah"), ("eval", "vt"), ("eval", "cwe"), ("eval", "fwe"), ("eval", "recall"),
            ("pareto",), ("calibrate",), ("bench",), ("bench", "op"), ("bench", "decode"),
            ("bench", "serve"), ("inspect",), ("info",))


class Usage(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def generate_refused(self, code, parts, *flags):
        self.check_refused(code, parts, "generate", "--model", vesper(), "--max-tokens", 2,
                           "--prompt", "hello there", *flags)

    def test_help_has_an_example(self):
        for command in COMMANDS:
            with self.subTest(command):
                result = self.run_ok(*command, "--help")
                self.assertIn("Example: twilight " + command[0], result.out)
                self.assertEqual(result.err, "")

    def test_top_level_help_names_every_command(self):
        result = self.run_ok("--help")
        for command in ("demo", "generate", "eval", "pareto", "calibrate", "bench", "inspect",
                        "info"):
            self.assertIn("\n  " + command, result.out)

    def test_version(self):
        self.assertRegex(self.run_ok("--version").out, r"^twilight \d+\.\d+\.\d+\n$")

    def test_commands(self):
        every = "demo, generate, eval, pareto, calibrate, bench, inspect, serve, info"
        self.check_refused(2, ("[command]", "got nothing", every))
        self.check_refused(2, ("[command]", "got 'fly'", every), "fly")
        self.check_refused(2, ("[command]", "got nothing", "accepted ppl, passkey"), "eval")
        self.check_refused(2, ("[command]", "got 'x'", "accepted ppl, passkey"), "eval", "x")
        self.check_refused(2, ("not expected", "extra"), "info", "extra")
        self.check_refused(2, ("--fast",), "info", "--fast")
        self.check_refused(2, ("--model", "required"), "generate", "--prompt", "x")

    def test_prompts(self):
        model = ("generate", "--model", vesper())
        empty = write(os.path.join(self.folder, "empty"), "")
        missing = os.path.join(self.folder, "missing")
        self.check_refused(2, ("--prompt", "--prompt-file"), *model)
        self.check_refused(2, ("--prompt", "--prompt-file", "2"), *model, "--prompt", "x",
                           "--prompt-file", empty)
        self.check_refused(2, ("[prompt]", "got ''", "accepted at least one character"), *model,
                           "--prompt", "")
        self.check_refused(2, ("[prompt]", "got " + empty, "accepted at least one character"),
                           *model, "--prompt-file", empty)
        self.check_refused(1, ("[open]", missing, "No such file"), *model, "--prompt-file", missing)
        self.check_refused(1, ("[open]", self.folder, "Is a directory"), *model, "--prompt-file",
                           self.folder)
        if os.geteuid() != 0:
            os.chmod(empty, 0)
            self.check_refused(1, ("[open]", empty, "Permission denied"), *model, "--prompt-file",
                               empty)

    def test_prompt_longer_than_the_context(self):
        self.generate_refused(2, ("[prompt]", "got 5 tokens", "accepted up to 2"), "--ctx", 2)
        self.generate_refused(2, ("[--ctx]", "got 99999", "up to the model's 32768"), "--ctx", 99999)

    def test_attention_flags(self):
        for flag, value, parts in (
                ("--attention", "best", ("[attention]", "'best'", "accepted dense, adaptive, paper")),
                ("--attention", "quest:0", ("quest:K", "'quest:0'", "accepted a number of tokens")),
                ("--attention", "quest:x", ("quest:K", "'quest:x'", "accepted a number of tokens")),
                ("--attn-p", "0", ("p, got 0", "accepted above 0 to 1")),
                ("--attn-p", "1.5", ("p, got 1.5", "accepted above 0 to 1")),
                ("--attn-p", "nan", ("p, got nan", "accepted above 0 to 1")),
                ("--attn-p", "some", ("--attn-p", "some", "accepted a number")),
                ("--candidates", "-1", ("[--candidates]", "got -1", "accepted a share")),
                ("--candidates", "0", ("[--candidates]", "got 0", "accepted a share")),
                ("--candidates", "nan", ("[--candidates]", "got nan", "accepted a share")),
                ("--min-candidates", "-1", ("min_candidates, got -1", "accepted 0 to")),
                ("--max-candidates", "5", ("max_candidates, got 5", "accepted 1024 to")),
                ("--min-tokens", "-1", ("min_tokens, got -1", "accepted 0 to")),
                ("--sinks", "-1", ("sink_tokens, got -1", "accepted 0 to")),
                ("--recent", "-1", ("recent_pages, got -1", "accepted 0 to")),
                ("--dense-layers", "-1", ("dense_layers, got -1", "accepted 0 to")),
                ("--dense-below", "-1", ("[--dense-below]", "got '-1'", "accepted auto")),
                ("--dense-below", "12x", ("[--dense-below]", "got '12x'", "accepted auto")),
                ("--key-bits", "5", ("key_bits, got 5", "accepted 2, 4, 8, 16")),
                ("--summary-bits", "8", ("summary_bits, got 8", "accepted 4, 16")),
                ("--page-size", "0", ("page_size, got 0", "accepted 1 to 256")),
                ("--page-size", "257", ("page_size, got 257", "accepted 1 to 256"))):
            with self.subTest(flag, value=value):
                # The model's profile, too, settles the size of a page.
                preset = ("--attention", "adaptive") if flag == "--page-size" else ()
                self.generate_refused(2, parts, flag, value, *preset)
        # The preset that ignores p refuses a bad one too.
        self.generate_refused(2, ("p, got 0",), "--attention", "dense", "--attn-p", "0")

    def test_not_a_number(self):
        serve = ("serve", "--model", vesper(), "--port", 0)
        for command, flags in (
                (("bench", "serve"), ("--rate", "--duration", "--drain", "--timeout")),
                (serve, ("--max-body", "--rate", "--burst", "--timeout", "--read-timeout",
                         "--write-timeout", "--grace")),
                (("bench", "op"), ("--budget",)),
                (("demo",), ("--depth",)),
                (("eval", "passkey"), ("--depths",)),
                (("eval", "fwe"), ("--alpha",)),
                (("inspect",), ("--depth",)),
                (("pareto",), ("--depths",))):
            for flag in flags:
                for value in ("nan", "-nan", "inf", "-1"):
                    with self.subTest(command=command[0], flag=flag, value=value):
                        self.check_refused(2, (flag, value, "number" if "nan" in value else "range"),
                                           *command, flag + "=" + value)

    def test_machine_flags(self):
        self.generate_refused(2, ("[isa]", "got 'mmx'", "accepted auto, scalar"), "--isa", "mmx")
        self.generate_refused(2, ("[threads]", "got -1", "accepted"), "--threads", "-1")
        self.generate_refused(2, ("--threads", "two", "accepted a number"), "--threads", "two")
        self.generate_refused(2, ("[device]", "got 'tpu'", "accepted cpu, ref, cuda:N"),
                              "--device", "tpu")

    def test_cuda_without_cuda(self):
        result = cli_lib.run("info", "--device", "cuda:0")
        if result.code == 0:
            self.skipTest("this build has a CUDA backend and a device")
        self.check_refused(1, ("cuda:0", "CUDA", "accepted cpu, ref"), "info", "--device", "cuda:0")

    def test_sampling_flags(self):
        for flag, value, parts in (
                ("--temperature", "-1", ("temperature, got -1", "accepted 0 or more")),
                ("--temperature", "nan", ("temperature, got nan", "accepted 0 or more")),
                ("--top-k", "-1", ("top_k, got -1", "accepted 0 or more")),
                ("--top-p", "0", ("top_p, got 0", "accepted above 0 to 1")),
                ("--top-p", "1.5", ("top_p, got 1.5", "accepted above 0 to 1")),
                ("--seed", "-1", ("--seed", "-1")),
                ("--max-tokens", "-1", ("--max-tokens", "-1", "0 to"))):
            with self.subTest(flag, value=value):
                self.check_refused(2, parts, "generate", "--model", vesper(), "--prompt", "x", flag,
                                   value)

    def test_demo_and_eval_flags(self):
        self.check_refused(2, ("--depth", "2", "0.0", "1.0"), "demo", "--depth", 2)
        self.check_refused(2, ("--depth", "-0.5", "0.0", "1.0"), "demo", "--depth", "-0.5")
        self.check_refused(2, ("[passkey]", "got 10 tokens", "accepted at least"), "demo", "--ctx",
                           10)
        self.check_refused(2, ("[passkey]", "too short", "accepted at least"), "demo", "--ctx",
                           30000, "--text", write(os.path.join(self.folder, "t"), "one line\n"))
        self.check_refused(2, ("--depths", "1.5", "0.0", "1.0"), "eval", "passkey", "--depths",
                           "0.5,1.5")
        self.check_refused(2, ("--trials", "0"), "eval", "passkey", "--trials", 0)
        self.check_refused(2, ("[eval]", "--last, got 200", "accepted 1 to", "199"), "eval", "ppl",
                           "--ctx", 200, "--last", 200)
        self.check_refused(2, ("[attention]", "'nope'"), "eval", "ppl", "--attention", "paper,nope")
        missing = os.path.join(self.folder, "missing")
        self.check_refused(1, ("[open]", missing), "eval", "ppl", "--text", missing)
        self.check_refused(2, ("[eval]", "too short", "accepted at least"), "eval", "ppl", "--ctx",
                           500, "--last", 5, "--text",
                           write(os.path.join(self.folder, "short"), "one line\n"))
