#!/bin/sh
# Checks and times the engine on cuda:0: greedy text equals the CPU's on the bundled model, decoding
# speed there and in the shape of an 8B model with random weights, at batch 1, 4 and 16 (the last
# needs 110 GB of device memory). Run from the repository's root.
#
# Usage: scripts/gpu_engine_check.sh PROGRAM OUTPUT [info|equal|decode|large]...
#   PROGRAM  twilight of a build with TWILIGHT_ENABLE_CUDA
set -u
program=${1:?the twilight program}
output=${2:?folder for results}
shift 2
[ $# -eq 0 ] && set -- info equal decode large
mkdir -p "$output"

. "$(dirname "$0")/gpu_libraries.sh"
model=models/vesper-19m
failed=0

for part in "$@"; do
  case $part in
    info)
      "$program" info --device cuda:0 || failed=1
      ;;
    equal)
      prompt=$(mktemp)
      head -c 24000 data/*.txt > "$prompt"
      for preset in dense adaptive paper paper-full quest:512 streaming; do
        run() {
          "$program" generate --json --model "$model" --prompt-file "$prompt" --max-tokens 96 \
            --ignore-eos --attention "$preset" --dense-below 0 $2 > "$output/run-$1.json" \
            2> "$output/run-$1.err" || { failed=1; head -c 400 "$output/run-$1.err"; }
        }
        run cpu ""
        run avx2 "--isa avx2"
        run cuda "--device cuda:0"
        python3 - "$output" "$preset" <<'PY' || failed=1
import json, sys
folder, preset = sys.argv[1:]
cpu, avx2, gpu = (json.load(open(f"{folder}/run-{d}.json")) for d in ("cpu", "avx2", "cuda"))


def same(other):
    pairs = enumerate(zip(other["tokens"], gpu["tokens"]))
    return next((i for i, (a, b) in pairs if a != b), len(gpu["tokens"]))


# At a near tie the CPU's instruction sets part from each other too.
print(f"{preset}: {same(cpu)} of {len(gpu['tokens'])} tokens as on the CPU, {same(avx2)} as with "
      f"--isa avx2, cpu {cpu['decode_tokens_per_second']:.0f} tokens/s, "
      f"cuda {gpu['decode_tokens_per_second']:.0f}, prefill "
      f"{cpu['prefill_tokens_per_second']:.0f}, {gpu['prefill_tokens_per_second']:.0f}")
sys.exit(0 if len(gpu["tokens"]) in (same(cpu), same(avx2)) else 1)
PY
        rm -f "$output"/run-*
      done
      rm -f "$prompt"
      ;;
    decode)
      "$program" bench decode --device cuda:0 --dense-below 0 --ctx 30000 --tokens 64 --force \
        --out "$output/cuda-decode-30k.json" || failed=1
      ;;
    large)
      folder=$(mktemp -d -p /dev/shm)
      if python3 bench/cuda/random_checkpoint.py \
        tests/golden/configs/llama-3.1-8b-instruct.json "$model" "$folder" 2; then
        for batch in 1 4 16; do
          "$program" bench decode --device cuda:0 --dense-below 0 --model "$folder" --ctx 32000 \
            --tokens 32 --batch $batch --attention adaptive,paper --force \
            --out "$output/cuda-decode-8b-32k-batch$batch.json" || failed=1
        done
      else
        failed=1
      fi
      rm -r "$folder"
      ;;
    *)
      echo "unknown part $part, accepted info, equal, decode, large" >&2
      exit 2
      ;;
  esac
done
exit $failed
