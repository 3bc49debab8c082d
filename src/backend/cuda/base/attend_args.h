#ifndef TWILIGHT_BACKEND_CUDA_BASE_ATTEND_ARGS_H_
#define TWILIGHT_BACKEND_CUDA_BASE_ATTEND_ARGS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "backend/cuda/device/subset.cuh"
#include "ops/params.h"

namespace twilight::cuda::base {

constexpr float kLog2E = 1.4426950408889634F;

/// A list of n tokens is attended in this many parts, which follow from n alone.
constexpr int kMaxSplits = 32;
constexpr int kSplitTokens = 512;

[[nodiscard]] constexpr int num_splits(int n) {
  const int wanted = (n + kSplitTokens - 1) / kSplitTokens;
  return wanted < 1 ? 1 : wanted > kMaxSplits ? kMaxSplits : wanted;
}
[[nodiscard]] constexpr int split_begin(int n, int splits, int split) {
  return static_cast<int>(std::int64_t{n} * split / splits);
}

/// Dense where `kept` is null.
struct AttendArgs {
  DeviceSubset seqs;
  QueryView q;
  PagedKvView kv;
  float scale_log2 = 0;
  const std::int32_t* kept = nullptr;
  const std::int32_t* kept_counts = nullptr;
  std::int64_t kept_stride = 0;
  TailParams tail;
  float* out = nullptr;
  std::int64_t out_seq_stride = 0;
  /// [B, Hq, kMaxSplits, D + 2]: maximum (log2), sum, weighted values.
  float* partials = nullptr;
  int page_shift = -1;   ///< log2 of the page size, -1 where it is no power of two
  bool aligned = false;  ///< rows of K and V start at multiples of 16 bytes
};

void launch_attend_bf16(const AttendArgs& args, dim3 grid, cudaStream_t stream);
void launch_attend_f16(const AttendArgs& args, dim3 grid, cudaStream_t stream);
void launch_attend_f32(const AttendArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace twilight::cuda::base

#endif  // TWILIGHT_BACKEND_CUDA_BASE_ATTEND_ARGS_H_
