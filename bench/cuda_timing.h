#ifndef TWILIGHT_BENCH_CUDA_TIMING_H_
#define TWILIGHT_BENCH_CUDA_TIMING_H_

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <vector>

#include <cuda_runtime_api.h>

#include "backend/cuda/cuda_check.h"

namespace twilight::cuda {

/// Microseconds of a launch.
struct LaunchTimes {
  double median = 0, low = 0, high = 0;
};

/// From events around each of `samples` launches, after three that do not count.
inline LaunchTimes time_launches(cudaStream_t stream, int samples,
                                 const std::function<void()>& launch) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  TWILIGHT_CUDA(cudaEventCreate(&begin));
  TWILIGHT_CUDA(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) launch();
  std::vector<float> times;
  for (int i = 0; i < samples; ++i) {
    TWILIGHT_CUDA(cudaEventRecord(begin, stream));
    launch();
    TWILIGHT_CUDA(cudaEventRecord(end, stream));
    TWILIGHT_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    TWILIGHT_CUDA(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(1000 * ms);
  }
  TWILIGHT_CUDA(cudaEventDestroy(begin));
  TWILIGHT_CUDA(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

/// The `main` of a benchmark whose argument is the number of samples.
inline int run_benchmark(int argc, char** argv, int samples, int (*run)(int samples)) {
  if (argc > 1) samples = std::atoi(argv[1]);
  if (samples < 1) {
    std::fprintf(stderr, "error: number of samples, got %s, accepted 1 or more\n", argv[1]);
    return 2;
  }
  try {
    return run(samples);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
  }
}

}  // namespace twilight::cuda

#endif  // TWILIGHT_BENCH_CUDA_TIMING_H_
