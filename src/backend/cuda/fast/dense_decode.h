#ifndef TWILIGHT_BACKEND_CUDA_FAST_DENSE_DECODE_H_
#define TWILIGHT_BACKEND_CUDA_FAST_DENSE_DECODE_H_

#include <cuda_runtime_api.h>

#include "backend/cuda/device/subset.cuh"
#include "core/buffer.h"
#include "ops/backend.h"

/// Dense decode attention on tensor cores, cut into parts of the sequence.
namespace twilight::cuda_fast {

/// D 64 or 128, bf16 or f16, pages of a multiple of 16 tokens, groups of up to 8, rows on 16-byte
/// boundaries.
[[nodiscard]] bool dense_decode_supports(const AttendDenseParams& params);
/// Floats of partial results taken of the arena.
[[nodiscard]] std::int64_t dense_decode_floats(std::int64_t num_seqs, std::int64_t num_q_heads,
                                               std::int64_t num_kv_heads, std::int64_t head_dim);
void dense_decode(const AttendDenseParams& params, const cuda::DeviceSubset& seqs, Arena& arena,
                  bool dependent, cudaStream_t stream);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_DENSE_DECODE_H_
