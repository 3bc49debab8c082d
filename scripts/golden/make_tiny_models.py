#!/usr/bin/env python3
"""Writes tiny random-weight checkpoints in the style of the models the engine supports.

Each folder has the config.json fields, tensor names, element type and file layout of its model at a
fraction of the size, so that loaders and forward passes can be compared with another implementation.
The same seed gives the same bytes.

    pip install numpy ml_dtypes safetensors
    scripts/golden/make_tiny_models.py [--out tests/golden/tiny]
"""

import argparse
import json
import pathlib
import zlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 320,
}

LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 500,
    "eos_token_id": [501, 508, 509],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 512,
}

LONGCHAT = {
    **LLAMA2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_scaling": {"factor": 8.0, "type": "linear"},
}

QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 250,
    "eos_token_id": 252,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 256,
}

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 250,
    "eos_token_id": 252,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 256,
}

MISTRAL01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 320,
}

# name, config.json, element type, number of shards
MODELS = [
    ("llama-2-7b-chat", LLAMA2, np.float16, 2),
    ("llama-3.1-8b-instruct", LLAMA31, ml_dtypes.bfloat16, 1),
    ("longchat-7b-v1.5-32k", LONGCHAT, np.float16, 1),
    ("qwen2.5-instruct", QWEN25, ml_dtypes.bfloat16, 1),
    ("qwen3", QWEN3, ml_dtypes.bfloat16, 1),
    ("mistral-7b-v0.1", MISTRAL01, ml_dtypes.bfloat16, 1),
]


def shapes(config):
    """Tensor names with shapes, in the order of the layers."""
    hidden = config["hidden_size"]
    inner = config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q = heads * head_dim
    kv = config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            yield layer + f"self_attn.{part}_proj.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield layer + f"self_attn.{part}_proj.bias", (rows,)
        yield layer + "self_attn.o_proj.weight", (hidden, q)
        if config["model_type"] == "qwen3":
            yield layer + "self_attn.q_norm.weight", (head_dim,)
            yield layer + "self_attn.k_norm.weight", (head_dim,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (inner, hidden)
        yield layer + "mlp.up_proj.weight", (inner, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def random_tensor(rng, name, shape):
    """Scales keep activations near 1 and attention neither flat nor saturated."""
    if "norm" in name:
        return rng.normal(1.0, 0.1, shape)
    if name.endswith(".bias"):
        return rng.normal(0.0, 0.2, shape)
    if "embed_tokens" in name or "lm_head" in name:
        return rng.normal(0.0, 0.08, shape)
    # Twice the variance-preserving scale for queries and keys spreads the scores.
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return rng.normal(0.0, gain * 0.08 * (64.0 / shape[1]) ** 0.5, shape)


def save_shard(tensors, path):
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)


def write_model(folder, name, config, dtype, num_shards):
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tensors = {key: random_tensor(rng, key, shape).astype(dtype) for key, shape in shapes(config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if num_shards == 1:
        save_shard(tensors, folder / "model.safetensors")
        return
    total = sum(t.nbytes for t in tensors.values())
    shards = [{} for _ in range(num_shards)]
    written = 0
    for key, tensor in tensors.items():
        shards[min(written * num_shards // total, num_shards - 1)][key] = tensor
        written += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        save_shard(shard, folder / file)
        weight_map.update({key: file for key in shard})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    root = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=root / "tests/golden/tiny")
    out = parser.parse_args().out
    for name, config, dtype, num_shards in MODELS:
        write_model(out / name, name, config, dtype, num_shards)
        size = sum(f.stat().st_size for f in (out / name).iterdir())
        print(f"{name}: {size} bytes")


if __name__ == "__main__":
    main()
