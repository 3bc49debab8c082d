#!/usr/bin/env python3
"""Writes a Llama checkpoint folder with a byte-level BPE tokenizer as one GGUF file.

    pip install gguf numpy
    scripts/vesper_to_gguf.py --out vesper.gguf [--model models/vesper-19m] [--type BF16]

Types: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1 for the matrices; norms are F32. Rows of a query or key
head are stored as the format wants them for this architecture, rotated pairs side by side. For models in
general there is llama.cpp's convert_hf_to_gguf.py.
"""
import argparse
import json
import pathlib

import gguf
import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def read_safetensors(path):
    """Tensors of one file in float32."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw[begin:end], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        yield name, values.astype(np.float32).reshape(entry["shape"])


def gguf_name(name):
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def interleave(weight, heads):
    """Row h D + s D / 2 + i becomes row h D + 2 i + s."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(writer, folder, config):
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = document["model"]
    tokens = [None] * (max(model["vocab"].values()) + 1)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for token, index in model["vocab"].items():
        tokens[index] = token
    for token in document["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # the pattern of vesper's tokenizer.json
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def main():
    root = pathlib.Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=root / "models/vesper-19m")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--type", default="BF16")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[args.type]

    writer = gguf.GGUFWriter(args.out, "llama")
    writer.add_name(args.model.name)
    files = gguf.LlamaFileType
    writer.add_file_type(files.ALL_F32 if args.type == "F32" else files[f"MOSTLY_{args.type}"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    write_tokenizer(writer, args.model, config)
    for path in sorted(args.model.glob("*.safetensors")):
        for name, weight in read_safetensors(path):
            if "q_proj" in name:
                weight = interleave(weight, config["num_attention_heads"])
            elif "k_proj" in name:
                weight = interleave(weight, config["num_key_value_heads"])
            if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
                writer.add_tensor(gguf_name(name), weight)
            else:
                data = gguf.quants.quantize(np.ascontiguousarray(weight), kind)
                writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{args.out}: {args.out.stat().st_size} bytes, {args.type}")


if __name__ == "__main__":
    main()
