#!/bin/sh
# Checks and times the engine on cuda:0: greedy text equals the CPU's on the bundled model, decoding
# speed there and in the shape of an 8B model with random weights. Run from the repository's root.
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
        for device in cpu cuda:0; do
          "$program" generate --json --model "$model" --prompt-file "$prompt" --max-tokens 96 \
            --ignore-eos --attention "$preset" --dense-below 0 --device "$device" \
            > "$output/run-$device.json" 2> "$output/run-$device.err" ||
            { failed=1; head -c 400 "$output/run-$device.err"; }
        done
        python3 - "$output" "$preset" <<'PY' || failed=1
import json, sys
folder, preset = sys.argv[1:]
cpu, gpu = (json.load(open(f"{folder}/run-{d}.json")) for d in ("cpu", "cuda:0"))
same = 0
for a, b in zip(cpu["tokens"], gpu["tokens"]):
    if a != b:
        break
    same += 1
print(f"{preset}: {same} of {len(cpu['tokens'])} tokens as on the CPU, "
      f"cpu {cpu['decode_tokens_per_second']:.0f} tokens/s, cuda {gpu['decode_tokens_per_second']:.0f}, "
      f"prefill {cpu['prefill_tokens_per_second']:.0f}, {gpu['prefill_tokens_per_second']:.0f}")
sys.exit(0 if same == len(cpu["tokens"]) else 1)
PY
        rm -f "$output"/run-*
      done
      rm -f "$prompt"
      ;;
    decode)
      "$program" bench decode --device cuda:0 --dense-below 0 --ctx 30000 --tokens 64 \
        --out "$output/cuda-decode-30k.json" || failed=1
      ;;
    large)
      folder=$(mktemp -d -p /dev/shm)
      python3 bench/cuda/random_checkpoint.py tests/golden/configs/llama-3.1-8b-instruct.json \
        "$model" "$folder" && ls -l "$folder" &&
        "$program" bench decode --device cuda:0 --dense-below 0 --model "$folder" --ctx 32000 \
          --tokens 32 --out "$output/cuda-decode-8b-32k.json" || failed=1
      rm -r "$folder"
      ;;
    *)
      echo "unknown part $part, accepted info, equal, decode, large" >&2
      exit 2
      ;;
  esac
done
exit $failed
