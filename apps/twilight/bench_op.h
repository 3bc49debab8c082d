#ifndef TWILIGHT_APPS_BENCH_OP_H_
#define TWILIGHT_APPS_BENCH_OP_H_

#include <cstdint>
#include <string>

#include "bench_common.h"
#include "workload.h"

namespace twilight::app {

struct OpFlags {
  BenchFlags bench;
  LayerShape shape;
  std::int32_t batch = 1;        ///< B
  std::int32_t context = 32768;  ///< N
  std::string dtype = "bf16";    ///< of the cache
  double budget = 0.02;
  std::string model, text;
  std::int32_t layer = -1;
  std::int32_t repeats = 21;
  std::uint64_t seed = 1;
};

/// Times one attention layer at a decode step, dense and under each preset; returns the exit
/// status.
int run_bench_op(const OpFlags& flags);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_BENCH_OP_H_
