#!/usr/bin/env python3
"""Decode speed of one GGUF file here and in llama.cpp, taking turns. JSON on stdout.

    gguf_decode.py --twilight PROGRAM FILE.gguf --lengths 1024 32640

A round is one run of `twilight bench decode` (dense and adaptive, step by step in turn) and one of llama.cpp
(flash attention, f16 cache, greedy) at each length. Calls go to llama_decode directly, so that no Python work
is timed. Up to 2,048 tokens llama.cpp's prefill is timed too, once a round. Longer caches of it are filled in
chunks of 512 tokens that do not attend to each other: dense attention takes the same time whatever is in the
cache, and a prefill of 32k tokens would take minutes. Its logits and tokens are checked by llama_cpp_decode.py.
"""
import argparse
import ctypes
import json
import pathlib
import statistics
import subprocess
import sys
import time

import llama_cpp
import numpy as np

import common

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHUNK = 512
LONGEST_PREFILL = 2048


class LlamaCpp:
    def __init__(self, gguf, context, threads):
        llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, CHUNK, CHUNK
        options.n_seq_max, options.kv_unified = 2, True
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F16
        self.ctx = llama_cpp.llama_init_from_model(self.model, options)
        if not self.ctx:
            raise RuntimeError("llama.cpp made no context")
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def tokenize(self, text):
        raw = text.encode()
        ids = (llama_cpp.llama_token * len(raw))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), ids, len(raw), True, False)
        return list(ids[:count])

    def feed(self, tokens, first, sequence):
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, first + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i + 1 == len(tokens)
        wall, cpu = time.perf_counter(), time.process_time()
        status = llama_cpp.llama_decode(self.ctx, batch)
        row = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        sample = (time.perf_counter() - wall, time.process_time() - cpu)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return row, sample

    def prefill(self, tokens):
        """Seconds."""
        llama_cpp.llama_memory_clear(self.memory, True)
        return sum(self.feed(tokens[first:first + CHUNK], first, 0)[1][0] for first in range(0, len(tokens), CHUNK))

    def fill(self, tokens):
        llama_cpp.llama_memory_clear(self.memory, True)
        for first in range(0, len(tokens), CHUNK):
            self.feed(tokens[first:first + CHUNK], first, 1)
            llama_cpp.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)

    def decode(self, token, length, count):
        vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        samples = []
        for i in range(count):
            row, sample = self.feed([token], length + i, 0)
            samples.append(sample)
            token = int(np.ctypeslib.as_array(row, shape=(vocab,)).argmax())
        return samples


@llama_cpp.llama_log_callback
def QUIET(level, text, data):
    pass


def twilight(args, length):
    command = [str(args.twilight), "bench", "decode", "--model", str(args.gguf), "--ctx", str(length), "--tokens",
               str(args.decode), "--threads", str(args.threads), "--attention", "adaptive", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--twilight", type=pathlib.Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8064])
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    llama = LlamaCpp(args.gguf, max(args.lengths) + CHUNK, args.threads)
    tokens = llama.tokenize((ROOT / "data/Persuasion.txt").read_bytes().decode("utf-8"))
    results = []
    for length in args.lengths:
        if length > LONGEST_PREFILL:
            llama.fill(tokens[:length])
        ours, theirs, bandwidth, prefill = {}, [], [], {"twilight": [], "llama.cpp": []}
        for _ in range(args.rounds):
            report = twilight(args, length)
            bandwidth += report["read_bandwidth_gb_per_second"]
            prefill["twilight"].append(round(report["prefill_tokens_per_second"], 1))
            if length <= LONGEST_PREFILL:
                prefill["llama.cpp"].append(round(length / llama.prefill(tokens[:length]), 1))
            for variant in report["results"]:
                ours.setdefault(variant["policy"]["name"], []).append(variant["ms_per_token"])
            theirs += llama.decode(tokens[length], length, args.decode)[2:]
            llama_cpp.llama_memory_seq_rm(llama.memory, 0, length, -1)
        entry = {"length": length, "read_bandwidth_gbs": bandwidth, "twilight": ours,
                 "llama.cpp": common.spread(theirs, args.threads), "prefill_tokens_s": prefill, "tokens_s": {}}
        for name, rounds in ours.items():
            entry["tokens_s"][name] = round(1e3 / statistics.median(r["median"] for r in rounds), 1)
        entry["tokens_s"]["llama.cpp"] = round(1e3 / entry["llama.cpp"]["median_ms"], 1)
        results.append(entry)
        print(f"{args.gguf.name} {length}: {entry['tokens_s']}, prefill {prefill}", file=sys.stderr, flush=True)
    print(json.dumps({"file": args.gguf.name, "kv_cache": "bf16 here, f16 in llama.cpp",
                      "environment": common.environment(args.threads, ["llama_cpp_python"]),
                      "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
                      "results": results}, indent=1))


if __name__ == "__main__":
    main()
