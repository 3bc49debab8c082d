#!/usr/bin/env python3
"""Mixed load on a server for a while: soak.py PROGRAM SOURCE [--minutes N] [options].

Watches the server's memory, threads, descriptors and pages. Fails where a request ends otherwise than
it should, where a page, thread or descriptor is not given back once all requests have ended, or where
memory grows by more than --growth MiB after the warm-up. The last line tells the outcome.
"""
import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import threading
import time

import serve_lib

CONTEXT, CACHE = 4096, 12288
WARM_UP = 1 / 3  # of the time: buffers are touched for the first time


def status_kib(pid, field):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    raise AssertionError(f"no {field}")


class Load:
    """Clients that send one request after another, `rate` a second in all."""

    def __init__(self, server, streams, rate, seed):
        self.server = server
        self.gap = streams / rate
        self.lock = threading.Lock()
        self.done = {}
        self.failures = []
        self.go = threading.Event()
        self.go.set()
        self.ended = False
        self.busy = 0
        self.threads = [threading.Thread(target=self.client, args=(random.Random(seed * 1000 + i),))
                        for i in range(streams)]
        for thread in self.threads:
            thread.start()

    def client(self, rng):
        while not self.ended:
            self.go.wait()
            with self.lock:
                if not self.go.is_set() or self.ended:
                    continue
                self.busy += 1
            kind = rng.choices(KINDS, WEIGHTS)[0]
            try:
                kind(self.server, rng)
                with self.lock:
                    self.done[kind.__name__] = self.done.get(kind.__name__, 0) + 1
            except Exception as error:  # whatever a client meets is a failure
                with self.lock:
                    self.failures.append(f"{kind.__name__}: {error!r}"[:400])
            finally:
                with self.lock:
                    self.busy -= 1
            time.sleep(rng.expovariate(1 / self.gap))

    @contextlib.contextmanager
    def paused(self):
        with self.lock:
            self.go.clear()
        serve_lib.wait_for(lambda: self.busy == 0, serve_lib.PATIENCE)
        serve_lib.wait_for(self.server.idle, serve_lib.PATIENCE)
        yield
        self.go.set()

    def stop(self):
        self.ended = True
        self.go.set()
        for thread in self.threads:
            thread.join()


# Prompt lengths. Few, since the CPU backend keeps a compiled product for every height of a prompt's last
# chunk that it meets: with any length memory grows for an hour until those caches are full.
LENGTHS = (3, 17, 40, 100, 200, 256, 300, 512, 700, 1000, 1500, 2000)


def prompt(rng):
    """Token ids: mostly short, some long, a third of them with a beginning that others have too."""
    length = LENGTHS[min(rng.randrange(len(LENGTHS)), rng.randrange(len(LENGTHS)))]
    shared = rng.randrange(3) == 0
    source = random.Random(rng.randrange(6)) if shared else rng
    return [source.randrange(100, 4000) for _ in range(length)]


def touch_cache(server):
    """Every page once and every length, so that memory does not grow as they come into use."""
    for length in LENGTHS:
        server.completion([99] * length, max_tokens=1, temperature=0)
    for i in range(CACHE // 2048 + 1):
        server.completion([100 + i] * 2048, max_tokens=1, temperature=0)


def policy(rng):
    return rng.choice(({}, {}, {"attention": "dense"}, {"attn_p": rng.choice((0.8, 0.9))}))


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def whole(server, rng):
    wanted = rng.randrange(1, 48)
    body = server.completion(prompt(rng), max_tokens=wanted, temperature=rng.choice((0, 0.8)),
                             ignore_eos=True, **policy(rng))
    expect(body["usage"]["completion_tokens"] == wanted, body["usage"])


def streamed(server, rng):
    events = server.stream("/v1/completions", prompt=prompt(rng), max_tokens=rng.randrange(1, 48),
                           ignore_eos=True, **policy(rng))
    expect(events[-1]["choices"][0]["finish_reason"] == "length", events[-1])


def chat(server, rng):
    events = server.stream("/v1/chat/completions", max_tokens=24,
                           messages=[{"role": "user", "content": "Tell me of the sea. " * 20}],
                           stop=["\n\n"], seed=rng.randrange(100), **policy(rng))
    expect(events[-1]["choices"][0]["finish_reason"] in ("stop", "length"), events[-1])


def scored(server, rng):
    body = server.completion(prompt(rng)[:512], max_tokens=1, echo=True, logprobs=3, temperature=0)
    expect(len(body["choices"][0]["logprobs"]["tokens"]) > 1, "no logprobs")


def several(server, rng):
    body = server.completion("One of many", max_tokens=8, n=rng.randrange(2, 5), temperature=1)
    expect(len(body["choices"]) >= 2, body)


def gone(server, rng):
    """Leaves in the middle of a stream."""
    with contextlib.closing(server.connect()) as sock:
        sock.sendall(serve_lib.post_bytes(
            "/v1/completions", {"stream": True, "prompt": prompt(rng), "max_tokens": 500,
                                "ignore_eos": True, "temperature": 0}))
        data = b""
        while b"data: " not in data:
            part = sock.recv(4096)
            expect(part, "closed early")
            data += part


def refused(server, rng):
    status, _, body = server.post("/v1/completions", prompt="x" * rng.randrange(1, 100),
                                  **rng.choice(({"max_tokens": -1}, {"attention": "none"},
                                                {"nonsense": 1}, {"model": "other"})))
    expect(status in (400, 404) and "error" in body, (status, body))


KINDS = (whole, streamed, chat, scored, several, gone, refused)
WEIGHTS = (4, 6, 2, 1, 1, 2, 1)


class Watch:
    """Samples of the server's process, and its state at quiet moments."""

    def __init__(self, server):
        self.server = server
        self.pid = server.process.pid
        self.start = time.monotonic()
        self.samples = []
        self.quiet = []

    def now(self):
        return time.monotonic() - self.start

    def sample(self):
        self.samples.append({"seconds": round(self.now(), 1),
                             "rss_mib": round(status_kib(self.pid, "VmRSS") / 1024, 2)})

    def check(self):
        """All requests have ended: what is not given back is lost."""
        metric = self.server.metric
        total, free, cached = (int(metric(f"twilight_pages_{name}"))
                               for name in ("total", "free", "cached"))
        time.sleep(6)  # idle connections close after five seconds
        self.quiet.append({"seconds": round(self.now(), 1), "pages_lost": total - free - cached,
                           "pages_cached": cached, "threads": len(os.listdir(f"/proc/{self.pid}/task")),
                           "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
                           "rss_mib": round(status_kib(self.pid, "VmRSS") / 1024, 2)})
        return self.quiet[-1]

    def growth(self, total_seconds):
        """MiB between medians of the third of the samples after the warm-up and of the last third."""
        rss = [s["rss_mib"] for s in self.samples if s["seconds"] >= WARM_UP * total_seconds]
        third = max(len(rss) // 3, 1)
        return statistics.median(rss[-third:]) - statistics.median(rss[:third])


def drive(args, server, watch, load):
    """Lets the load run, with a pause for every check."""
    seconds = args.minutes * 60
    checks = 3 if args.minutes < 5 else 12
    for number in range(1, checks + 1):
        while watch.now() < number * seconds / checks - 7:
            time.sleep(min(seconds / 120, 10))
            watch.sample()
            if server.process.poll() is not None:
                raise AssertionError("the server has ended")
        with load.paused():
            quiet = watch.check()
        if args.progress:
            print(json.dumps(quiet), file=sys.stderr, flush=True)


def problems_of(args, watch, load, growth):
    yield from load.failures[:5]
    for quiet in watch.quiet:
        if quiet["pages_lost"] != 0:
            yield f"pages lost, {quiet}"
    first, last = watch.quiet[(len(watch.quiet) - 1) // 3], watch.quiet[-1]
    for what in ("threads", "descriptors"):
        if last[what] > first[what] + args.streams:
            yield f"{what} grew, from {first[what]} to {last[what]}"
    if growth > args.growth:
        yield f"memory grew by {growth:.1f} MiB, accepted up to {args.growth}"


def run(args):
    server = serve_lib.Server("--ctx", CONTEXT, "--cache-tokens", CACHE, "--max-seqs", 8,
                              "--max-connections", 64, *args.server)
    with server:
        touch_cache(server)
        watch = Watch(server)
        load = Load(server, args.streams, args.rate, args.seed)
        try:
            drive(args, server, watch, load)
        finally:
            load.stop()
        growth = watch.growth(args.minutes * 60)
        problems = list(problems_of(args, watch, load, growth))
        report = {"minutes": args.minutes, "streams": args.streams, "rate": args.rate,
                  "seed": args.seed, "requests": dict(sorted(load.done.items())),
                  "failures": len(load.failures),
                  "completion_tokens": int(server.metric("twilight_completion_tokens_total")),
                  "prompt_tokens": int(server.metric("twilight_prompt_tokens_total")),
                  "preemptions": int(server.metric("twilight_preemptions_total")),
                  "growth_mib": round(growth, 2), "quiet": watch.quiet, "samples": watch.samples}
        if server.stop() != 0:
            problems.append("the server's exit status is not 0")
    return report, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("source")
    parser.add_argument("--minutes", type=float, default=1, help="at least 0.75")
    parser.add_argument("--streams", type=int, default=6, help="clients at once")
    parser.add_argument("--rate", type=float, default=8, help="requests a second, all clients")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--growth", type=float, default=8, help="MiB that memory may grow by")
    parser.add_argument("--out", help="report as JSON")
    parser.add_argument("--progress", action="store_true", help="a line at each quiet moment")
    parser.add_argument("server", nargs="*", help="after --: further flags of twilight serve")
    args = parser.parse_args()
    if args.minutes < 0.75 or args.streams < 1 or not args.rate > 0:
        parser.error("accepted --minutes from 0.75, --streams from 1, --rate above 0")
    serve_lib.PROGRAM, serve_lib.SOURCE = args.program, args.source
    serve_lib.PATIENCE = 600  # a machine may be busy with other things for a while
    try:
        report, problems = run(args)
    except AssertionError as error:
        print(f"soak: {error}\nsoak: FAILED")
        return 1
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    quiet = report["quiet"]
    print(f"{sum(report['requests'].values())} requests, {report['prompt_tokens']} prompt and "
          f"{report['completion_tokens']} completion tokens; memory {quiet[0]['rss_mib']} to "
          f"{quiet[-1]['rss_mib']} MiB, growth after the warm-up {report['growth_mib']} MiB")
    for problem in problems:
        print(f"soak: {problem}")
    print("soak: " + ("FAILED" if problems else "PASSED"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
