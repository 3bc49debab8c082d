#ifndef TWILIGHT_BACKEND_CUDA_FAST_PREFILL_ARGS_H_
#define TWILIGHT_BACKEND_CUDA_FAST_PREFILL_ARGS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "backend/cuda/fast/kv_rows.h"

namespace twilight::cuda_fast {

/// Query tokens of a block of either prefill kernel.
inline constexpr int kPrefillRows = 128;

/// Arguments of the prefill kernels. Queries and outputs are [T, Hq, D] in f32.
struct PrefillArgs : KvRows {
  PrefillArgs() = default;
  explicit PrefillArgs(const PagedKvView& kv) : KvRows(kv) {}

  const float* q = nullptr;
  std::int64_t q_token_stride = 0;
  std::int32_t num_tokens = 0;
  std::int32_t group = 0;
  const std::int32_t* table = nullptr;
  const std::int32_t* length = nullptr;
  std::int32_t page_size = 0;
  std::int32_t page_shift = 0;  ///< log2 of page_size where that is a power of two
  float scale_log2 = 0;
  float* out = nullptr;
  std::int64_t out_token_stride = 0;
};

/// The kernel on Hopper's asynchronous products, compiled for sm_90a alone. D 64 or 128, bf16 or
/// f16, page_size a power of two.
cudaError_t launch_prefill_async(const PrefillArgs& args, bool bf16, int dim, int num_q_heads,
                                 cudaStream_t stream);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_PREFILL_ARGS_H_
