"""What the external baselines share: spread of a timing, and a description of the machine and libraries."""
import datetime
import importlib.metadata
import os
import pathlib
import statistics
import time


def measure(run, warmup=3, repeats=20):
    """(wall, CPU) seconds of each of `repeats` calls of `run`; CPU is summed over the process's threads."""
    for _ in range(warmup):
        run()
    samples = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        samples.append((time.perf_counter() - wall, time.process_time() - cpu))
    return samples


def spread(samples, threads):
    """Milliseconds. Quartiles rather than a deviation: a shared machine skews one way.

    cpu_ms_per_thread is the median CPU time over the number of threads: what the wall time would be were
    the work evenly split and never interrupted: an estimate, no measured speed. With OMP_WAIT_POLICY=passive waiting
    threads sleep, and it is the steadier figure on a loaded machine.
    """
    wall = sorted(1e3 * sample[0] for sample in samples)
    low, median, high = statistics.quantiles(wall, n=4)
    cpu = statistics.median(1e3 * sample[1] for sample in samples) / threads
    return {"best_ms": round(wall[0], 3), "median_ms": round(median, 3), "q1_ms": round(low, 3),
            "q3_ms": round(high, 3), "worst_ms": round(wall[-1], 3), "runs": len(wall),
            "cpu_ms_per_thread": round(cpu, 3)}


def environment(threads, packages):
    info = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "threads": threads, "logical_cpus": os.cpu_count(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"), "load_1min": round(os.getloadavg()[0], 2),
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
