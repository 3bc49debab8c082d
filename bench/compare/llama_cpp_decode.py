#!/usr/bin/env python3
"""Prefill and decode speed of llama.cpp on a GGUF made by scripts/vesper_to_gguf.py. JSON on stdout.

Flash attention, f16 KV cache, greedy. First it is checked against tests/golden/logits/vesper-19m.json
(transformers, float32): tokenisation, logits after 512 tokens, and the greedy continuation. Then one
prompt is filled step by step; at each length tokens are decoded, timed and taken out of the cache
again. Calls go to llama_decode directly, so that no Python work is timed but an argmax over the vocabulary.
"""
import argparse
import json
import pathlib
import sys
import time

import llama_cpp
import numpy as np

import common

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Runner:
    def __init__(self, gguf, context, threads, batch):
        self.llm = llama_cpp.Llama(str(gguf), n_ctx=context, n_threads=threads, n_threads_batch=threads,
                                   n_batch=batch, n_ubatch=batch, flash_attn=True, verbose=False,
                                   type_k=llama_cpp.GGML_TYPE_F16, type_v=llama_cpp.GGML_TYPE_F16)
        self.ctx, self.batch = self.llm.ctx, batch
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def clear(self):
        llama_cpp.llama_memory_clear(self.memory, True)

    def truncate(self, length):
        assert llama_cpp.llama_memory_seq_rm(self.memory, 0, length, -1)

    def feed(self, tokens):
        for i in range(0, len(tokens), self.batch):
            part = tokens[i:i + self.batch]
            ids = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(ids, len(part)))
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")

    def logits(self):
        row = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(row, shape=(self.llm.n_vocab(),))

    def decode(self, count):
        ids, samples = [], []
        for _ in range(count):
            ids.append(int(self.logits().argmax()))
            wall, cpu = time.perf_counter(), time.process_time()
            self.feed(ids[-1:])
            self.logits()
            samples.append((time.perf_counter() - wall, time.process_time() - cpu))
        return ids, samples


def agreement(runner, golden, text):
    case = next(c for c in golden["cases"] if c["name"] == "prompt-512")
    tokens, vocab = case["tokens"], golden["vocab_size"]
    rows = np.fromfile(ROOT / "tests/golden/logits" / golden["logits_file"], "<f4").reshape(-1, vocab)
    want = rows[case["first_row"] + case["positions"].index(len(tokens) - 1)]
    own = runner.llm.tokenize(text[:4000].encode(), add_bos=True)[:len(tokens)]
    runner.clear()
    runner.feed(tokens)
    got = runner.logits().copy()
    ids, _ = runner.decode(len(case["greedy"]))
    same = next((i for i, (a, b) in enumerate(zip(ids, case["greedy"])) if a != b), len(ids))
    return {"tokens_agree": own == tokens, "max_abs_logit_difference": float(np.abs(got - want).max()),
            "largest_logit": float(np.abs(want).max()), "greedy_tokens_agreeing": same,
            "greedy_tokens": len(ids)}


def measure(runner, tokens, lengths, count, threads):
    runner.clear()
    results, spent, spent_cpu, filled = [], 0.0, 0.0, 0
    for length in sorted(lengths):
        wall, cpu = time.perf_counter(), time.process_time()
        runner.feed(tokens[filled:length])
        runner.logits()
        spent, spent_cpu = spent + time.perf_counter() - wall, spent_cpu + time.process_time() - cpu
        filled = length
        _, samples = runner.decode(count)
        runner.truncate(length)
        times = common.spread(samples, threads)
        results.append({"length": length, "prefill_s": round(spent, 3),
                        "prefill_cpu_s_per_thread": round(spent_cpu / threads, 3),
                        "prefill_tokens_s": round(length / spent, 1),
                        "prefill_tokens_s_by_cpu_time": round(length * threads / spent_cpu, 1), "decode": times,
                        "decode_tokens_s_median": round(1e3 / times["median_ms"], 1),
                        "decode_tokens_s_best": round(1e3 / times["best_ms"], 1),
                        "decode_tokens_s_by_cpu_time": round(1e3 / times["cpu_ms_per_thread"], 1)})
        print(f"length {length} done", results[-1], file=sys.stderr, flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384, 32768])
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    args = parser.parse_args()
    golden = json.loads((ROOT / "tests/golden/logits/vesper-19m.json").read_text())
    text = (ROOT / "data/Persuasion.txt").read_bytes().decode("utf-8")
    runner = Runner(args.gguf, max(args.lengths) + 512, args.threads, args.batch)
    tokens = runner.llm.tokenize(text.encode(), add_bos=True)
    print(json.dumps({"baseline": "llama.cpp", "file": args.gguf.name, "kv_cache": "f16", "flash_attention": True,
                      "environment": common.environment(args.threads, ["llama_cpp_python", "gguf"]),
                      "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
                      "agreement": agreement(runner, golden, text),
                      "results": measure(runner, tokens, args.lengths, args.decode, args.threads)}, indent=1))


if __name__ == "__main__":
    main()
