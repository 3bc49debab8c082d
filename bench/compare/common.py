"""What the external baselines share: spread of a timing, and a description of the machine and libraries."""
import datetime
import importlib.metadata
import os
import pathlib
import statistics
import time


def measure(run, warmup=3, repeats=20, budget_s=None):
    """Seconds of each call of `run`, at least `repeats` of them, more until `budget_s` is spent."""
    for _ in range(warmup):
        run()
    seconds, begin = [], time.perf_counter()
    while len(seconds) < repeats or (budget_s and time.perf_counter() - begin < budget_s):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def spread(seconds):
    """Milliseconds. Quartiles rather than a deviation: a shared machine skews one way."""
    ms = [1e3 * s for s in seconds]
    low, median, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
    return {"best_ms": round(min(ms), 3), "median_ms": round(median, 3), "q1_ms": round(low, 3),
            "q3_ms": round(high, 3), "worst_ms": round(max(ms), 3), "runs": len(ms)}


def environment(threads, packages):
    info = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "threads": threads, "logical_cpus": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2),
            "versions": {name: importlib.metadata.version(name) for name in packages}}
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        fields = dict(part for part in ((x.strip() for x in line.split(":", 1))
                                        for line in first.split("\n") if ":" in line))
        info["cpu"] = fields.get("model name")
        info["cpu_family_model"] = f"{fields.get('cpu family')}/{fields.get('model')}"
        wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16")
        have = fields.get("flags", "").split()
        info["cpu_flags"] = [flag for flag in wanted if flag in have]
    return info
