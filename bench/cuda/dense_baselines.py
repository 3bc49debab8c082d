"""Times dense decode attention of other libraries on distinct caches, cold L2.

PyTorch's cuDNN and flash backends; FlashInfer's paged decode (pages of 16 in random order, its
CUDA-core and tensor-core kernels) where the package flashinfer-python is installed.

Usage: dense_baselines.py OUT.json [kv_heads:batch:ctx ...]. Times are CUDA-graph replays over as
many distinct batches as 8.6 GB of keys and values hold, median of 9, per step.
"""
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import flashinfer
except ImportError:
    flashinfer = None

DIM = 128
PAGE = 16
Q_HEADS = 32
POOL_ROWS = 64 * 32768 * 8


def time_steps(step, groups):
    """Median microseconds of one of the `groups` steps that `step` runs."""
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


def time_sdpa(backend, q, k, v):
    def step():
        for i in range(len(q)):
            torch.nn.functional.scaled_dot_product_attention(q[i], k[i], v[i], enable_gqa=True)

    with sdpa_kernel(backend):
        return time_steps(step, len(q))


def time_flashinfer(tensor_cores, q, k, v):
    """The same numbers as pages [pages, PAGE, heads, DIM]; which number is where does not matter."""
    groups, batch, kv_heads, ctx, _ = k.shape
    pages = batch * ctx // PAGE
    cache = [(k[i].view(pages, PAGE, kv_heads, DIM), v[i].view(pages, PAGE, kv_heads, DIM))
             for i in range(groups)]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD",
        use_tensor_cores=tensor_cores)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * (ctx // PAGE)
    order = torch.randperm(pages, device="cuda").to(torch.int32)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, order, last, Q_HEADS, kv_heads, DIM, PAGE, q_data_type=torch.bfloat16,
                 kv_data_type=torch.bfloat16)
    out = torch.empty((batch, Q_HEADS, DIM), device="cuda", dtype=torch.bfloat16)

    def step():
        for i in range(groups):
            wrapper.run(q[i].view(batch, Q_HEADS, DIM), cache[i], out=out)

    return time_steps(step, groups)


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
        runs = {"cudnn": (time_sdpa, SDPBackend.CUDNN_ATTENTION),
                "flash": (time_sdpa, SDPBackend.FLASH_ATTENTION)}
        if flashinfer is not None:
            runs["flashinfer"] = (time_flashinfer, False)
            runs["flashinfer_tensor_cores"] = (time_flashinfer, True)
        for name, (time, kind) in runs.items():
            try:
                row[name + "_us"] = round(time(kind, q, k, v), 2)
            except (RuntimeError, ValueError) as error:
                row[name + "_error"] = str(error).splitlines()[0]
        print(row, flush=True)
        rows.append(row)
        del q, k, v
        torch.cuda.empty_cache()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        json.dump({"device": torch.cuda.get_device_name(0), "torch": torch.__version__,
                   "cudnn": torch.backends.cudnn.version(),
                   "flashinfer": getattr(flashinfer, "__version__", None), "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
