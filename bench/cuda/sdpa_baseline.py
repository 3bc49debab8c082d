"""Times PyTorch's dense decode attention (cuDNN and flash backends) on distinct caches, cold L2.

Usage: sdpa_baseline.py OUT.json [kv_heads:batch:ctx ...]. Times are CUDA-graph replays over as many
distinct batches as 8.6 GB of keys and values hold, median of 9, per step.
"""
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DIM = 128
Q_HEADS = 32
POOL_ROWS = 64 * 32768 * 8


def time_backend(backend, q, k, v, groups):
    def step():
        for i in range(groups):
            torch.nn.functional.scaled_dot_product_attention(q[i], k[i], v[i], enable_gqa=True)

    with sdpa_kernel(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        times = []
        for _ in range(9):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / groups)
    return statistics.median(times)


def main():
    configs = [tuple(int(x) for x in a.split(":")) for a in sys.argv[2:]]
    rows = []
    for kv_heads, batch, ctx in configs:
        seqs = max(POOL_ROWS // kv_heads // ctx, 1)
        groups = max(min(seqs // batch, 64), 1)
        shape = (groups, batch, kv_heads, ctx, DIM)
        k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        q = torch.randn((groups, batch, Q_HEADS, 1, DIM), device="cuda", dtype=torch.bfloat16)
        row = {"kv_heads": kv_heads, "batch": batch, "ctx": ctx}
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION),
                              ("flash", SDPBackend.FLASH_ATTENTION)):
            try:
                row[name + "_us"] = round(time_backend(backend, q, k, v, groups), 2)
            except RuntimeError as error:
                row[name + "_error"] = str(error).splitlines()[0]
        print(row, flush=True)
        rows.append(row)
        del q, k, v
        torch.cuda.empty_cache()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        json.dump({"device": torch.cuda.get_device_name(0), "torch": torch.__version__,
                   "cudnn": torch.backends.cudnn.version(), "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
