"""Broken checkpoints: exit status 1 and one line that names file, field, value and choice."""
import os
import shutil
import struct
import tempfile

import cli_lib
from cli_lib import Safetensors, copy_model, edit_json, path, run, vesper, write

UP = "model.layers.0.mlp.up_proj.weight"


class BrokenModels(cli_lib.ProgramTest):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.model = os.path.join(self.folder.name, "model")

    def file(self, name):
        return os.path.join(self.model, name)

    def refused(self, *parts, code=1):
        self.check_refused(code, parts, "info", "--model", self.model)

    def config(self, edit):
        copy_model(self.model)
        edit_json(self.file("config.json"), edit)

    def weights(self, edit):
        copy_model(self.model)
        tensors = Safetensors(self.file("model.safetensors"))
        edit(tensors)
        tensors.save()

    def test_the_models_themselves_load(self):
        for name in os.listdir(path("tests", "golden", "tiny")):
            report = self.run_json("info", "--model", path("tests", "golden", "tiny", name))
            self.assertGreater(report["model"]["parameters"], 0)

    def test_missing_folder(self):
        self.refused("[open]", self.file("config.json"), "No such file")

    def test_folder_is_a_file(self):
        write(self.model, "x")
        self.refused("[gguf]", self.model, "first bytes, got 'x', accepted 'GGUF'")

    def test_no_weights(self):
        copy_model(self.model)
        os.remove(self.file("model.safetensors"))
        self.refused("[safetensors]", self.model, "got none", "accepted model.safetensors")

    def test_missing_shard(self):
        copy_model(self.model, vesper())
        os.remove(self.file("model-00002-of-00003.safetensors"))
        self.refused("[safetensors]", "model.safetensors.index.json",
                     "shard 'model-00002-of-00003.safetensors'", "no such file", "accepted")

    def test_truncated_shard(self):
        for size in (100_000, 1000, 5, 0):
            with self.subTest(size=size):
                shutil.rmtree(self.model, ignore_errors=True)
                copy_model(self.model, path("tests", "golden", "tiny", "llama-2-7b-chat"))
                shard = self.file("model-00002-of-00002.safetensors")
                os.truncate(shard, size)
                self.refused("[safetensors]", shard, "truncated", "got", "accepted")

    def test_bytes_after_the_last_tensor(self):
        self.weights(lambda t: t.data.extend(b"\0\0\0"))
        self.refused("[safetensors]", self.file("model.safetensors"), "size, got", "accepted")

    def test_wrong_shape(self):
        def edit(tensors):
            tensors.header[UP]["shape"].reverse()
        self.weights(edit)
        self.refused("[weights]", self.file("model.safetensors"), UP, "got [128, 80]",
                     "accepted [80, 128]")

    def test_shape_and_size_disagree(self):
        def edit(tensors):
            tensors.header[UP]["shape"][0] += 1
        self.weights(edit)
        self.refused("[safetensors]", UP, "data_offsets, got 20480 bytes",
                     "accepted 10368 elements of BF16")

    def test_wrong_dtype(self):
        def edit(tensors):
            entry = tensors.header[UP]
            entry["dtype"] = "I64"
            entry["shape"] = [80, 32]
        self.weights(edit)
        self.refused("[safetensors]", UP, "dtype, got 'I64'", "accepted F32, F16 or BF16")

    def test_overlapping_offsets(self):
        def edit(tensors):
            first, second = tensors.tensors()[:2]
            size = tensors.header[second]["data_offsets"]
            begin = tensors.header[first]["data_offsets"][0]
            tensors.header[second]["data_offsets"] = [begin, begin + size[1] - size[0]]
        self.weights(edit)
        self.refused("[safetensors]", self.file("model.safetensors"), "overlap", "accepted")

    def test_offsets_out_of_range(self):
        def edit(tensors):
            last = tensors.tensors()[-1]
            begin, end = tensors.header[last]["data_offsets"]
            tensors.header[last]["data_offsets"] = [begin + 1000, end + 1000]
        self.weights(edit)
        self.refused("[safetensors]", "data_offsets, got [", "accepted offsets up to")

    def test_offsets_backwards(self):
        def edit(tensors):
            tensors.header[UP]["data_offsets"].reverse()
        self.weights(edit)
        self.refused("[safetensors]", UP, "data_offsets, got [", "begin no greater than end")

    def test_missing_tensor(self):
        def edit(tensors):
            tensors.header["model.layers.0.mlp.renamed"] = tensors.header.pop(UP)
        self.weights(edit)
        self.refused("[weights]", UP, "got nothing", "accepted shape [80, 128]")

    def test_tensor_without_a_place(self):
        def edit(tensors):
            end = len(tensors.data)
            tensors.data.extend(b"\0\0")
            tensors.header["model.extra"] = {"dtype": "BF16", "shape": [1],
                                             "data_offsets": [end, end + 2]}
        self.weights(edit)
        self.refused("[weights]", "'model.extra'", "accepted only the model's own tensors")

    def test_not_finite(self):
        for bits, name in ((0x7fc0, "NaN"), (0x7f80, "infinity"), (0xff80, "-infinity")):
            with self.subTest(name):
                def edit(tensors, bits=bits):
                    at = tensors.header[UP]["data_offsets"][0] + 2 * 77
                    tensors.data[at:at + 2] = struct.pack("<H", bits)
                shutil.rmtree(self.model, ignore_errors=True)
                self.weights(edit)
                self.refused("[weights]", self.file("model.safetensors"), UP,
                             "element 77 of 10240", "got " + name, "accepted finite")

    def test_malformed_header(self):
        for header in (b"{\"a\": ", b"[1, 2]", b"", b"{\"a\": 5}", b"{\"\xff\": {}}"):
            with self.subTest(header):
                shutil.rmtree(self.model, ignore_errors=True)
                copy_model(self.model)
                write(self.file("model.safetensors"), struct.pack("<Q", len(header)) + header)
                self.refused("[safetensors]", self.file("model.safetensors"))

    def test_header_length(self):
        copy_model(self.model)
        write(self.file("model.safetensors"), struct.pack("<Q", 1 << 62) + b"{}")
        self.refused("[safetensors]", "header length, got 4611686018427387904", "accepted at most")

    def test_git_lfs_pointer(self):
        copy_model(self.model)
        write(self.file("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n")
        self.refused("[safetensors]", "Git LFS pointer", "accepted")

    def test_malformed_config(self):
        for text in ("{\"hidden_size\": ", "", "[]", "null", "{\"a\": 1, \"a\": 2}", "\xff"):
            with self.subTest(text):
                shutil.rmtree(self.model, ignore_errors=True)
                copy_model(self.model)
                write(self.file("config.json"), text.encode("latin-1"))
                self.refused("[config]", self.file("config.json"))

    def test_config_values(self):
        for field, value, accepted in (
                ("hidden_size", 0, "1 to"), ("hidden_size", "many", "1 to"),
                ("num_hidden_layers", -1, "1 to"), ("vocab_size", 1 << 40, "1 to"),
                ("num_key_value_heads", 3, "divisor of num_attention_heads"),
                ("rms_norm_eps", "x", "number"), ("hidden_act", "gelu", "silu"),
                ("max_position_embeddings", None, "1 to")):
            with self.subTest(field, value=value):
                shutil.rmtree(self.model, ignore_errors=True)
                self.config(lambda c, f=field, v=value: c.__setitem__(f, v))
                self.refused("[config]", self.file("config.json"), field, "got", "accepted",
                             accepted)

    def test_unknown_architecture(self):
        self.config(lambda c: c.update(architectures=["FalconForCausalLM"]))
        self.refused("[config]", "architectures", "FalconForCausalLM", "accepted LlamaForCausalLM")

    def test_unknown_model_type(self):
        self.config(lambda c: c.update(model_type="falcon"))
        self.refused("[config]", "model_type", "falcon", "accepted llama, mistral, qwen2 or qwen3")

    def test_unknown_rope(self):
        self.config(lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}))
        self.refused("[config]", "rope_scaling.rope_type", "yarn",
                     "accepted default, linear or llama3")

    def test_malformed_tokenizer(self):
        for text in ("{\"model\": ", "", "[]", "{}", "{\"model\": {\"type\": \"Nope\"}}"):
            with self.subTest(text):
                shutil.rmtree(self.model, ignore_errors=True)
                copy_model(self.model)
                write(self.file("tokenizer.json"), text)
                self.refused("[" + self.file("tokenizer.json") + "]")

    def test_tokenizer_larger_than_the_vocabulary(self):
        copy_model(self.model)
        shutil.copyfile(path("models", "vesper-19m", "tokenizer.json"),
                        self.file("tokenizer.json"))
        self.refused("vocabulary", "got 4096 tokens", "accepted up to the vocab_size 256")

    def test_no_tokenizer(self):
        copy_model(self.model)
        self.run_json("info", "--model", self.model)
        result = run("generate", "--model", self.model, "--prompt", "x")
        self.assertEqual(result.code, 1, result.err)
        self.assertIn("tokenizer.json", result.err)
