#!/usr/bin/env python3
"""Writes small.gguf: every kind of metadata value and a few tensors, seed of gguf_fuzz.

    pip install gguf numpy && tests/golden/gguf/make_corpus.py
"""
import pathlib

import gguf
import numpy as np

writer = gguf.GGUFWriter(pathlib.Path(__file__).with_name("small.gguf"), "llama")
for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
    getattr(writer, "add_" + name)("value." + name, 7)
writer.add_float32("value.float32", 0.5)
writer.add_float64("value.float64", 0.25)
writer.add_bool("value.bool", True)
writer.add_array("value.strings", ["a", "bc", ""])
writer.add_array("value.ints", [1, 2, 3])
values = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
writer.add_tensor("plain", values)
for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16):
    writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
