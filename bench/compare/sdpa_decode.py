#!/usr/bin/env python3
"""Dense decode attention by PyTorch's CPU scaled_dot_product_attention. JSON on stdout.

One query token per sequence, no mask. K and V are [B, Hkv, N, D], and no two sequences or heads share
memory. GB/s counts K and V once. Variants:
  gqa      q [B, Hq, 1, D], enable_gqa=True
  grouped  q [B, Hkv, G, D]: the group's heads as the rows of one problem, which reads K and V once
"""
import argparse
import json
import math

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import common

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def variants(q, k, v):
    batch, heads, _, dim = q.shape
    grouped = q.view(batch, k.shape[1], heads // k.shape[1], dim)
    return {"gqa": lambda: sdpa(q, k, v, enable_gqa=True), "grouped": lambda: sdpa(grouped, k, v)}


def check(q, k, v, out):
    """Largest error of the last sequence against float32 arithmetic written out."""
    group = q.shape[1] // k.shape[1]
    kk, vv = (x[-1].float().repeat_interleave(group, 0) for x in (k, v))
    scores = (q[-1].float() @ kk.transpose(1, 2)) / math.sqrt(q.shape[-1])
    want = (torch.softmax(scores, -1) @ vv).view(-1)
    return float((out[-1].float().reshape(-1) - want).abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--variants", nargs="+", default=["gqa", "grouped"], choices=["gqa", "grouped"])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    results = []
    with torch.inference_mode():
        for batch in args.batch:
            for dtype in args.dtypes:
                shape = (batch, args.kv_heads, args.tokens, args.dim)
                k, v = (torch.empty(shape, dtype=DTYPES[dtype]).normal_() for _ in range(2))
                q = torch.empty((batch, args.heads, 1, args.dim), dtype=DTYPES[dtype]).normal_()
                size = (k.numel() + v.numel()) * k.element_size()
                for name in args.variants:
                    run = variants(q, k, v)[name]
                    error = check(q, k, v, run())
                    times = common.spread(common.measure(run, repeats=args.repeats), args.threads)
                    results.append({"batch": batch, "dtype": dtype, "variant": name, **times, "kv_bytes": size,
                                    "best_gb_s": round(size / times["best_ms"] / 1e6, 2),
                                    "median_gb_s": round(size / times["median_ms"] / 1e6, 2),
                                    "max_abs_error": error})
    fastest = {str(b): min((r for r in results if r["batch"] == b), key=lambda r: r["median_ms"])
               for b in args.batch}
    shape = {"tokens": args.tokens, "heads": args.heads, "kv_heads": args.kv_heads, "dim": args.dim}
    print(json.dumps({"baseline": "torch sdpa decode", "shape": shape,
                      "environment": common.environment(args.threads, ["torch"]),
                      "fastest": {b: [r["dtype"], r["variant"], r["median_ms"]] for b, r in fastest.items()},
                      "results": results}, indent=1))


if __name__ == "__main__":
    main()
