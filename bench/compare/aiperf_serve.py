#!/usr/bin/env python3
"""The same load on `twilight serve` by NVIDIA's AIPerf and by `twilight bench serve`, one after the other.

Prints one JSON object: what each of the two clients measured. They should agree on what they both measure.
Needs `pip install aiperf` in the Python that runs this.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
AIPERF = pathlib.Path(sys.executable).with_name("aiperf")


def pick(report, name):
    """Mean and percentiles of one of AIPerf's metrics, as it has them (milliseconds)."""
    metric = report[name]
    return {key: metric[key] for key in ("avg", "p50", "p90", "p99", "max") if key in metric}


def aiperf(args, url, model):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [AIPERF, "profile", "--model", model.name, "--url", url, "--endpoint-type", "completions",
             "--streaming", "--tokenizer", model, "--concurrency", str(args.streams),
             "--request-count", str(args.requests), "--isl", str(args.prompt_tokens),
             "--osl", str(args.output_tokens), "--extra-inputs", "ignore_eos:true",
             "--random-seed", "1", "--ui", "none", "--artifact-dir", folder],
            check=True, stdout=sys.stderr, stderr=sys.stderr)
        report = json.loads(pathlib.Path(folder, "profile_export_aiperf.json").read_text())
    return {"requests": report["request_count"]["avg"],
            "failed": report.get("error_request_count", {}).get("avg", 0),
            "output_tokens_per_second": report["output_token_throughput"]["avg"],
            "first_token_ms": pick(report, "time_to_first_token"),
            "per_token_ms": pick(report, "inter_token_latency"),
            "whole_ms": pick(report, "request_latency")}


def own(args, url, model):
    out = subprocess.run(
        [args.program, "bench", "serve", "--json", "--url", url, "--model", model,
         "--streams", str(args.streams), "--requests", str(args.requests),
         "--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(args.output_tokens)],
        check=True, stdout=subprocess.PIPE).stdout
    result = json.loads(out)["results"][0]

    def ms(name):
        return {"avg" if key == "mean" else key: 1e3 * value
                for key, value in result[name].items() if key != "count"}
    return {"requests": result["requests"], "failed": result["requests"] - result["ok"],
            "output_tokens_per_second": result["output_tokens_per_second"],
            "first_token_ms": ms("first_token_seconds"), "per_token_ms": ms("per_token_seconds"),
            "whole_ms": ms("total_seconds"), "pages_lost": result["pages_lost"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default=ROOT / "build/release/bin/twilight")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/vesper-19m")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args()
    server = subprocess.Popen(
        [args.program, "serve", "--model", args.model, "--port", "0", "--json", "--log-level", "warning"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        url = json.loads(server.stdout.readline())["url"]
        report = {"load": {"streams": args.streams, "requests": args.requests,
                           "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens},
                  "aiperf": aiperf(args, url, args.model), "twilight_bench_serve": own(args, url, args.model)}
    finally:
        server.terminate()
        server.wait()
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
