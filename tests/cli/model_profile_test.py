"""The profile that lies with a model: who reads it, what goes before it, and what is refused."""
import json
import os
import random
import struct
import tempfile

import cli_lib
from cli_lib import vesper, write

PROFILE = "twilight.json"
SMALL = ("--min-candidates", 64, "--min-tokens", 8, "--dense-below", 0)


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def write_gguf(name):
    """A Llama of one layer, random weights and a token for each byte."""
    width, wide, bytes_ = 64, 96, [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(b) for b in bytes_] + [chr(256 + i) for i in range(256 - len(bytes_))] + ["th"]
    keys = {"general.architecture": "llama", "llama.block_count": 1,
            "llama.embedding_length": width, "llama.feed_forward_length": wide,
            "llama.attention.head_count": 1, "llama.attention.head_count_kv": 1,
            "llama.context_length": 2048, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["t h"],
            "tokenizer.ggml.token_type": [1] * len(tokens)}
    tensors = {"token_embd.weight": (width, len(tokens)), "output_norm.weight": (width,),
               "blk.0.attn_norm.weight": (width,), "blk.0.ffn_norm.weight": (width,),
               "blk.0.ffn_gate.weight": (width, wide), "blk.0.ffn_up.weight": (width, wide),
               "blk.0.ffn_down.weight": (wide, width)}
    for part in ("q", "k", "v", "output"):
        tensors[f"blk.0.attn_{part}.weight"] = (width, width)

    def value(item):
        """The number of a type, and the bytes."""
        if isinstance(item, str):
            return 8, string(item)
        if isinstance(item, int):
            return 4, struct.pack("<I", item)
        if isinstance(item, float):
            return 6, struct.pack("<f", item)
        parts = [value(each) for each in item]
        kind = 5 if parts[0][0] == 4 else parts[0][0]  # token types are signed
        return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(data for _, data in parts)

    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    for key, item in keys.items():
        kind, data = value(item)
        head += string(key) + struct.pack("<I", kind) + data
    body, rng = b"", random.Random(1)
    for key, shape in tensors.items():
        head += string(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(body))
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        body += struct.pack(f"<{count}f", *(rng.gauss(0, 0.2) for _ in range(count)))
    return write(name, head + bytes(-len(head) % 32) + body)


class ModelProfile(cli_lib.ProgramTest):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.text = write(os.path.join(folder.name, "text"), "It was a cold morning. " * 200)
        cls.gguf = write_gguf(os.path.join(folder.name, "small.gguf"))
        cls.models = {}
        for name, source in (("vesper", vesper()), ("gguf", cls.gguf)):
            out = os.path.join(folder.name, name + ".json")
            result = cli_lib.run("calibrate", "--model", source, "--text", cls.text, "--ctx", 200,
                                 "--last", 16, "--attention", "paper-full", "--target-ppl", "100%",
                                 "--no-layers", *SMALL[:4], "--out", out)
            if result.code != 0:
                raise AssertionError(result.err)
            with open(out, encoding="utf-8") as file:
                cls.models[name] = json.load(file)

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def model(self, change=None):
        """A model with a profile, which `change` edits or replaces by a text."""
        model = self.without_profile()
        profile = json.loads(json.dumps(self.models["vesper"]))
        text = change(profile) if change else None
        write(os.path.join(model, PROFILE), text or json.dumps(profile))
        return model

    def without_profile(self):
        """A folder of its own around the bundled model's files."""
        model = os.path.join(self.folder, f"model{len(os.listdir(self.folder))}")
        os.mkdir(model)
        for name in os.listdir(vesper()):
            if name != PROFILE:
                os.symlink(os.path.join(vesper(), name), os.path.join(model, name))
        return model

    def generate(self, model, *flags):
        return ("generate", "--model", model, "--prompt", "one two three", "--max-tokens", 2, *flags)

    def test_generate_takes_it(self):
        model = self.model()
        name = os.path.join(model, PROFILE)
        report = self.run_json(*self.generate(model))
        self.assertEqual(report["profile"], name)
        self.assertEqual(report["policy"]["name"], "profile")
        p = self.models["vesper"]["policy"]["p"]
        self.assertAlmostEqual(report["policy"]["p"], p, places=6)
        first, rest = self.run_ok(*self.generate(model)).err.split("\n", 1)
        self.assertEqual(first, f"Attention from {name}: p {p:.3f}, dense layers 0 "
                                "(--profile none: the preset adaptive)")
        self.assertIn("new tokens", rest)

    def test_what_goes_before_it(self):
        model = self.model()
        for flags in (("--attention", "adaptive"), ("--profile", "none")):
            report = self.run_json(*self.generate(model, *flags))
            self.assertNotIn("profile", report)
            self.assertEqual((report["policy"]["name"], report["policy"]["dense_layers"]),
                             ("adaptive", 2))
            self.assertNotIn("Attention", self.run_ok(*self.generate(model, *flags)).err)
        other = json.loads(json.dumps(self.models["vesper"]))
        other["policy"]["p"] = 0.625
        named = write(os.path.join(self.folder, "other.json"), json.dumps(other))
        report = self.run_json(*self.generate(model, "--profile", named))
        self.assertEqual((report["profile"], report["policy"]["p"]), (named, 0.625))
        # Flags change single fields of it.
        report = self.run_json(*self.generate(model, "--attn-p", "0.5", "--dense-layers", 1))
        self.assertEqual((report["policy"]["name"], report["policy"]["p"],
                          report["policy"]["dense_layers"]), ("profile", 0.5, 1))
        self.assertEqual(report["policy"]["selector"], self.models["vesper"]["policy"]["selector"])
        err = self.run_ok(*self.generate(model, "--attn-p", "0.5", "--dense-layers", 1)).err
        self.assertIn(": p 0.500, dense layers 1 (", err)

    def test_every_command_that_decodes(self):
        model = self.model()
        name = os.path.join(model, PROFILE)
        text = ("--text", self.text)
        load = ("--requests", 2, "--streams", 1, "--prompt-tokens", 20, "--output-tokens", 2,
                "--ctx", 64)
        for command in (("inspect", "--prompt", "one two three", "--tokens", 2),
                        ("bench", "decode", "--ctx", 100, "--tokens", 2, *text),
                        ("bench", "serve", *load, *text)):
            with self.subTest(command[:2]):
                report = self.run_json(*command, "--model", model)
                self.assertEqual(report["profile"], name)
                if command[0] == "bench":
                    names = [r.get("attention") if command[1] == "serve" else r["policy"]["name"]
                             for r in report["results"]]
                    self.assertEqual(names, ["dense", "profile"])
                report = self.run_json(*command, "--model", model, "--attention", "adaptive")
                self.assertNotIn("profile", report)
                if command[0] != "bench":
                    continue
                # In a list, the preset "profile" is the model's or the file's.
                both = (*command, "--attention", "adaptive,profile", "--model")
                for which in ((model,), (self.without_profile(), "--profile", name)):
                    report = self.run_json(*both, *which)
                    self.assertEqual(report["profile"], name)
                    self.assertEqual(report["results"][-1]["policy"]["name"], "profile")
                self.check_refused(2, ("[--attention]", "profile", "accepted with --profile FILE"),
                                   *both, self.without_profile())
                self.check_refused(2, ("[--profile]", "'profile'"), *command, "--model", model,
                                   "--attention", "paper", "--profile", name)
        # The bundled model's, wherever the program looks for it.
        report = self.run_json("demo", "--ctx", 1024, "--dense-below", 0, "--seed", 3, "--tokens",
                               12, codes=(0, 1))
        self.assertTrue(report["profile"].endswith("models/vesper-19m/" + PROFILE))
        self.assertEqual(report["sparse"]["policy"]["name"], "profile")

    def test_measuring_commands_pass_it_over(self):
        # Broken, so that reading it could not go unnoticed.
        model = self.model(lambda profile: "{}")
        common = ("--model", model, "--text", self.text, "--ctx", 200)
        report = self.run_json("eval", "ppl", *common, "--last", 4)
        self.assertNotIn("profile", report)
        report = self.run_json("pareto", *common, "--last", 4, "--attention", "paper-full", "--ps",
                               "0.9", *SMALL[:4], "--out", os.path.join(self.folder, "p.svg"))
        self.assertNotIn("profile", report)
        # What writes it can write it anew.
        self.run_ok("calibrate", *common, "--last", 16, "--attention", "paper-full", "--target-ppl",
                    "100%", "--no-layers", *SMALL[:4], "--out", os.path.join(model, PROFILE),
                    "--force")
        self.assertEqual(self.run_json(*self.generate(model))["policy"]["name"], "profile")
        for command in (("eval", "ppl"), ("pareto",), ("calibrate",)):
            self.assertIn("profile", self.run_ok(*command, "--help").out)

    def test_info(self):
        model = self.model()
        report = self.run_json("info", "--model", model)["model"]
        self.assertEqual(report["profile"], os.path.join(model, PROFILE))
        self.assertRegex(report["attention"], r"^p 0\.\d+, dense layers 0$")
        text = self.run_ok("info", "--model", model).out
        self.assertRegex(text, r"  profile +\S+twilight\.json\n  attention +p 0\.")
        self.assertNotIn("profile", self.run_json("info", "--model",
                                                 self.without_profile())["model"])
        by_layer = self.model(lambda profile: profile["policy"].update(
            layer_p=[0.5 + 0.25 * (i % 2) for i in range(profile["model"]["layers"])]))
        report = self.run_json("info", "--model", by_layer)["model"]
        self.assertEqual(report["attention"], "p 0.500 to 0.750 by layer, dense layers 0")

    def test_the_page_size_is_the_profile_s(self):
        model = self.model(lambda profile: profile.update(page_size=32))
        command = ("bench", "decode", "--ctx", 100, "--tokens", 2, "--text", self.text, "--model",
                   model)
        self.assertEqual(self.run_json(*command)["page_size"], 32)
        self.assertEqual(self.run_json(*command, "--profile", "none")["page_size"], 16)
        self.check_refused(2, ("--page-size 16", "accepted 32", "--profile none goes without it"),
                           *command, "--page-size", 16)

    def test_beside_a_gguf_file(self):
        os.mkdir(os.path.join(self.folder, "models"))
        file = os.path.join(self.folder, "models", "small.gguf")
        os.symlink(self.gguf, file)
        self.assertNotIn("profile", self.run_json(*self.generate(file)))
        name = write(file + "." + PROFILE, json.dumps(self.models["gguf"]))
        for model in (file, os.path.dirname(file)):
            report = self.run_json(*self.generate(model))
            self.assertEqual((report["profile"], report["policy"]["name"]), (name, "profile"))
        # The folder's own file goes first there.
        in_folder = write(os.path.join(os.path.dirname(file), PROFILE),
                          json.dumps(self.models["gguf"]))
        self.assertEqual(self.run_json(*self.generate(os.path.dirname(file)))["profile"], in_folder)
        self.assertEqual(self.run_json(*self.generate(file))["profile"], name)

    def test_refused(self):
        def other_layers(profile):
            profile["model"]["layers"] += 1

        def fancy(profile):
            profile["policy"]["fancy"] = 1

        def bad_p(profile):
            profile["policy"]["p"] = 2

        for parts, change in (
                (("model, got layers", "was calibrated on"), other_layers),
                (("policy.fancy", "no such field"), fancy),
                (("p, got 2", "accepted above 0 to 1"), bad_p),
                (("format, got another kind of file",), lambda profile: "{}"),
                (("format, got another kind of file",), lambda profile: "not json")):
            model = self.model(change)
            parts = ("[--profile]", os.path.join(model, PROFILE), *parts)
            with self.subTest(parts):
                hint = "; --profile none goes without it"
                self.check_refused(2, (*parts, hint), *self.generate(model))
                self.check_refused(2, (*parts, hint), "serve", "--model", model, "--port", 0)
                self.check_refused(2, parts, "info", "--model", model)
                self.run_ok(*self.generate(model, "--profile", "none"))
                self.run_ok(*self.generate(model, "--attention", "paper"))
        # One that the user names has no such way out.
        model = self.model(fancy)
        refused = cli_lib.run(*self.generate(model, "--profile", os.path.join(model, PROFILE)))
        self.assertEqual(refused.code, 2)
        self.assertNotIn("goes without it", refused.err)
        os.remove(os.path.join(model, PROFILE))
        os.mkdir(os.path.join(model, PROFILE))
        self.check_refused(1, ("[open]", PROFILE, "Is a directory", hint), *self.generate(model))

    def test_the_bundled_profile(self):
        report = self.run_json("info", "--model", vesper())["model"]
        self.assertEqual(report["profile"], os.path.join(vesper(), PROFILE))
        with open(report["profile"], encoding="utf-8") as file:
            profile = json.load(file)
        self.assertTrue(profile["calibration"]["held_out"]["target_kept"])
        self.assertLess(profile["policy"]["dense_layers"], 2)
