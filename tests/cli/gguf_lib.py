"""Writing a small GGUF model: one layer, byte-level tokenizer, Q8_0 matrices."""
import struct

Q8_0, F32 = 8, 0
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT = 64, 2, 1, 32, 258, 512


def text(value):
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def byte_alphabet():
    """The printable character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def value(kind, content):
    """Number of the kind, then the content."""
    if kind == "u32":
        return struct.pack("<II", 4, content)
    if kind == "f32":
        return struct.pack("<If", 6, content)
    if kind == "string":
        return struct.pack("<I", 8) + text(content)
    assert kind == "strings"
    return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(text, content))


def metadata(**more):
    pairs = {
        "general.architecture": ("string", "llama"),
        "llama.block_count": ("u32", 1),
        "llama.embedding_length": ("u32", HIDDEN),
        "llama.feed_forward_length": ("u32", HIDDEN),
        "llama.attention.head_count": ("u32", HEADS),
        "llama.attention.head_count_kv": ("u32", KV_HEADS),
        "llama.context_length": ("u32", CONTEXT),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "llama-bpe"),
        "tokenizer.ggml.tokens": ("strings", ["<s>", "</s>", *byte_alphabet()]),
        "tokenizer.ggml.merges": ("strings", []),
        "tokenizer.ggml.bos_token_id": ("u32", 0),
        "tokenizer.ggml.eos_token_id": ("u32", 1)}
    pairs.update({key.replace("__", "."): pair for key, pair in more.items()})
    return pairs


def q8_0(rows, columns):
    """Blocks of 32: an f16 scale, then codes that differ from row to row."""
    block = struct.pack("<e", 0.001)
    return b"".join(block + bytes((r * 7 + c * 3 + i) % 100 for i in range(32))
                    for r in range(rows) for c in range(columns // 32))


def write_model(name, **more):
    """`more` are pairs of kind and content, with __ for the dots of their keys."""
    pairs = metadata(**more)
    norm = struct.pack(f"<{HIDDEN}f", *[1.0] * HIDDEN)
    tensors = [("token_embd.weight", Q8_0, VOCAB), ("output_norm.weight", F32, 0)]
    for part, rows in (("attn_norm", 0), ("attn_q", HEADS * HEAD_DIM),
                       ("attn_k", KV_HEADS * HEAD_DIM), ("attn_v", KV_HEADS * HEAD_DIM),
                       ("attn_output", HIDDEN), ("ffn_norm", 0), ("ffn_gate", HIDDEN),
                       ("ffn_up", HIDDEN), ("ffn_down", HIDDEN)):
        tensors.append((f"blk.0.{part}.weight", Q8_0 if rows else F32, rows))
    heads, data = b"", b""
    for tensor, kind, rows in tensors:
        data += bytes(-len(data) % 32)
        sizes = (HIDDEN, rows) if rows else (HIDDEN,)
        heads += text(tensor) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        data += q8_0(rows, HIDDEN) if rows else norm
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    out += b"".join(text(key) + value(*pair) for key, pair in pairs.items()) + heads
    with open(name, "wb") as file:
        file.write(out + bytes(-len(out) % 32) + data)
    return name
