"""Writes a checkpoint of random bf16 weights in the shape of a config.json, to time decoding with.

Usage: random_checkpoint.py CONFIG TOKENIZER_FOLDER OUTPUT_FOLDER [QUERY_GAIN]

The tokenizer, and the ids of its first and end tokens, come from another model's folder. Weights
are normal with a standard deviation of 0.02, one block of 16 Mi values repeated from varying
offsets; norms are 1. Query weights are QUERY_GAIN (1) times as large: with 1 attention is nearly
flat, as no trained model's is, and top-p keeps thousands of tokens; with 2 it keeps a few hundred
of 32k, as in trained models.
"""
import json
import os
import shutil
import sys

import numpy as np

BLOCK = 1 << 24


def tensors(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads", heads) * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield layer + "self_attn.k_proj.weight", (kv, hidden)
        yield layer + "self_attn.v_proj.weight", (kv, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (inner, hidden)
        yield layer + "mlp.up_proj.weight", (inner, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def main():
    config_path, tokenizer, output = sys.argv[1:4]
    gain = np.float32(sys.argv[4]) if len(sys.argv) > 4 else np.float32(1)
    with open(config_path) as file:
        config = json.load(file)
    with open(os.path.join(tokenizer, "config.json")) as file:
        other = json.load(file)
    for key in ("bos_token_id", "eos_token_id"):
        if key in other:
            config[key] = other[key]
        else:
            config.pop(key, None)
    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, "config.json"), "w") as file:
        json.dump(config, file)
    shutil.copy(os.path.join(tokenizer, "tokenizer.json"), output)

    normal = np.random.default_rng(1).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)

    def to_bf16(values):
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return np.concatenate([bits, bits])

    block, queries = to_bf16(normal), to_bf16(normal * gain)
    one = np.uint16(0x3F80)
    header, at = {}, 0
    for name, shape in tensors(config):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(output, "model.safetensors"), "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for number, (name, shape) in enumerate(tensors(config)):
            left = int(np.prod(shape))
            if len(shape) == 1:
                file.write(np.full(left, one).tobytes())
                continue
            begin = number * 1299709 % BLOCK
            while left > 0:
                count = min(left, BLOCK)
                source = queries if name.endswith("q_proj.weight") else block
                file.write(memoryview(source[begin:begin + count]))
                left -= count


if __name__ == "__main__":
    main()
