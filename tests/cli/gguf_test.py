"""What info and inspect say of a GGUF file, and sliding windows of either format."""
import os
import shutil
import tempfile

import cli_lib
import gguf_lib
from cli_lib import copy_model, edit_json, path, vesper

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
          "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


class GgufFiles(cli_lib.ProgramTest):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def model(self, **more):
        return gguf_lib.write_model(os.path.join(self.folder, "model.gguf"), **more)

    def info(self, model, *flags):
        return self.run_json("info", "--model", model, *flags)["model"]

    def test_info(self):
        model = self.model()
        report = self.info(model)
        self.assertEqual(report["format"], "gguf v3")
        self.assertEqual(report["weight_dtype"], "Q8_0")
        first, second = report["weight_types"]
        weights = 64 * (258 + 64 + 2 * 32 + 64 + 3 * 64)
        self.assertEqual(first, {"type": "Q8_0", "tensors": 8, "parameters": weights,
                                 "bytes": weights // 32 * 34, "held": "blocks"})
        self.assertEqual(second, {"type": "f32", "tensors": 3, "parameters": 192, "bytes": 768,
                                  "held": None})
        self.assertEqual(report["tokenizer"], "BPE, split as llama-bpe")
        self.assertIsNone(report["chat_template"])
        self.assertIn("no template", report["no_chat_template"])
        self.assertEqual(report["max_context"], 512)
        self.assertIsNone(report["sliding_window"])
        text = self.run_ok("info", "--model", model).out
        self.assertRegex(text, r"weights +Q8_0: 8 tensors, 0\.0\d\d MB, held in blocks\n")
        self.assertRegex(text, r"weights +f32: 3 tensors, 0\.001 MB\n")
        self.assertRegex(text, r"sliding_window +none\n")

    def test_chat_template(self):
        known = self.info(self.model(tokenizer__chat_template=("string", CHATML)))
        self.assertEqual(known["chat_template"], "chatml")
        self.assertNotIn("no_chat_template", known)
        other = self.info(self.model(tokenizer__chat_template=("string", "{{ messages }}")))
        self.assertIsNone(other["chat_template"])
        self.assertIn("chatml", other["no_chat_template"])

    def test_a_folder(self):
        report = self.info(vesper())
        self.assertEqual(report["format"], "safetensors")
        self.assertEqual([t["type"] for t in report["weight_types"]], ["bf16"])
        self.assertEqual(report["weight_types"][0]["bytes"], report["weight_bytes"])
        self.assertEqual(report["tokenizer"], "BPE")

    def test_inspect(self):
        model = self.model()
        flags = ("inspect", "--model", model, "--prompt", "to the sea", "--tokens", 4,
                 "--ignore-eos")
        report = self.run_json(*flags)
        self.assertEqual(report["checkpoint"]["format"], "gguf v3")
        self.assertEqual(report["checkpoint"]["weight_types"][0]["held"], "blocks")
        for name in ("page.html", "picture.svg"):
            out = os.path.join(self.folder, name)
            self.run_ok(*flags, "--out", out)
            with open(out, encoding="utf-8") as file:
                self.assertIn("gguf v3, Q8_0 in blocks; cpu (", file.read())

    def check_window(self, model, window):
        report = self.info(model)
        self.assertEqual((report["sliding_window"], report["max_context"]), (window, window))
        words = f"{window}, its sliding window"
        self.check_refused(2, ("[--ctx]", words), "generate", "--model", model, "--prompt", "a",
                           "--ctx", window + 1)
        self.check_refused(2, ("max_context", f"accepted 1 to {window}, the model's sliding window"),
                           "serve", "--model", model, "--port", 0, "--ctx", window + 1)
        self.run_ok("generate", "--model", model, "--prompt", "a", "--ctx", window,
                    "--max-tokens", 2)

    def test_sliding_window(self):
        self.check_window(self.model(llama__attention__sliding_window=("u32", 128)), 128)
        folder = os.path.join(self.folder, "mistral")
        os.makedirs(folder)
        for name in os.listdir(vesper()):
            if name not in ("config.json", "twilight.json"):  # edited; of another architecture
                os.symlink(os.path.join(vesper(), name), os.path.join(folder, name))
        shutil.copyfile(os.path.join(vesper(), "config.json"), os.path.join(folder, "config.json"))
        edit_json(os.path.join(folder, "config.json"), lambda config: config.update(
            architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=128))
        self.check_window(folder, 128)

    def test_a_window_that_hides_nothing(self):
        report = self.info(self.model(llama__attention__sliding_window=("u32", 512)))
        self.assertEqual((report["sliding_window"], report["max_context"]), (None, 512))
        folder = copy_model(os.path.join(self.folder, "mistral"),
                            path("tests", "golden", "tiny", "mistral-7b-v0.1"))
        edit_json(os.path.join(folder, "config.json"),
                  lambda config: config.update(sliding_window=None))
        self.assertIsNone(self.info(folder)["sliding_window"])
