#!/usr/bin/env python3
"""Writes blocks.bin: random weight blocks and what the `gguf` package makes of them.

    pip install gguf && make_blocks.py [--out FILE]

For each type, little-endian: u32 GGUF type number, u32 blocks, the blocks, then their weights as f32. Every byte of a block is
random, except that f16 scales are finite and of ordinary size.
"""
import argparse
import pathlib
import struct

import gguf
import numpy as np
from gguf import quants

# Byte offsets of the f16 fields of a block.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "F16": (0,), "BF16": (0,), "F32": (),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("blocks.bin"))
    args = parser.parse_args()
    random = np.random.default_rng(7)
    out = bytearray()
    for name, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        length, size = gguf.GGML_QUANT_SIZES[kind]
        count = {1: 64, 32: 9, 256: 3}[length]
        blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
        if name == "F32":
            blocks = random.standard_normal((count, 1)).astype(np.float32).view(np.uint8)
        for at in halves:
            blocks[:, at:at + 2] = (random.standard_normal((count, 1)) * 0.05).astype(np.float16).view(np.uint8)
        weights = quants.dequantize(blocks.reshape(1, -1), kind).astype(np.float32).reshape(-1)
        assert weights.size == count * length and np.isfinite(weights).all()
        out += struct.pack("<II", int(kind), count) + blocks.tobytes() + weights.tobytes()
    args.out.write_bytes(out)


if __name__ == "__main__":
    main()
