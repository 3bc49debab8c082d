#ifndef TWILIGHT_APPS_BENCH_DECODE_H_
#define TWILIGHT_APPS_BENCH_DECODE_H_

#include <cstdint>
#include <string>

#include "bench_common.h"

namespace twilight::app {

struct DecodeFlags {
  BenchFlags bench;
  std::string model;
  std::string text;             ///< empty: the bundled one
  std::int32_t context = 8192;  ///< tokens of the prefill
  std::int32_t tokens = 64;     ///< decoded with each policy
  std::int32_t batch = 1;       ///< sequences of a step, each with memory of its own
};

/// Times decode steps of a model after one prefill, dense and under each preset; returns the exit
/// status.
int run_bench_decode(const DecodeFlags& flags);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_BENCH_DECODE_H_
