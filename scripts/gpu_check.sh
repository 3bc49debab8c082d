#!/bin/sh
# Checks the CUDA backend on a machine with a GPU: tests, compute-sanitizer over a part of them, the
# dense benchmark. Results and logs go to a folder.
#
# Usage: scripts/gpu_check.sh BINARIES OUTPUT [tests|sanitize|bench]...
#   BINARIES  folder with cuda_test, step_check and cuda_dense_bench of a build with
#             TWILIGHT_ENABLE_CUDA and TWILIGHT_BUILD_BENCHMARKS
set -u
binaries=${1:?folder with cuda_test, step_check and cuda_dense_bench}
output=${2:?folder for results}
shift 2
[ $# -eq 0 ] && set -- tests sanitize bench
mkdir -p "$output"

. "$(dirname "$0")/gpu_libraries.sh"
nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader
failed=0
report() {
  name=$1
  shift
  if "$@" > "$output/$name.log" 2>&1; then
    echo "$name: passed"
  else
    echo "$name: FAILED"
    failed=1
  fi
  tail -n 4 "$output/$name.log"
}

for part in "$@"; do
  case $part in
    tests)
      report tests "$binaries/cuda_test" --gtest_brief=1
      grep -E "^cuDNN|FAILED" "$output/tests.log" | head -n 60
      report step_check "$binaries/step_check"
      ;;
    sanitize)
      # One case of each kind: a sanitizer makes kernels tens of times slower.
      some='*group_4_dim_96*:*adaptive*page_size_16*:*subset_of_sequences*:*FarTail*:*PrefillCuda*/1:*LinearCuda*/3:ModelCuda.*:*GraphCuda*'
      some="$some:*LayerCuda.MatchesReferenceInEveryBatch/0"
      for tool in memcheck racecheck; do
        report "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$binaries/cuda_test" \
          --gtest_brief=1 --gtest_filter="$some"
        for case in quarters_normal quarters_min_tokens adaptive_normal paper_normal; do
          report "$tool-$case" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$binaries/step_check" "$case"
        done
      done
      ;;
    bench)
      if "$binaries/cuda_dense_bench" 9 > "$output/dense.json"; then
        echo "bench: $output/dense.json"
      else
        echo "bench: FAILED"
        failed=1
      fi
      ;;
    *)
      echo "unknown part $part, accepted tests, sanitize, bench" >&2
      exit 2
      ;;
  esac
done
exit $failed
