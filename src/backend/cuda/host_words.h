#ifndef TWILIGHT_BACKEND_CUDA_HOST_WORDS_H_
#define TWILIGHT_BACKEND_CUDA_HOST_WORDS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "backend/cuda/device/subset.cuh"
#include "core/buffer.h"
#include "ops/params.h"

/// Small host arrays on their way into device memory. They travel as kernel arguments: no staging
/// buffer that a later call might overwrite, and a captured graph keeps the values it was captured
/// with.
namespace twilight::cuda {

/// Copies `count` 32-bit words to device memory.
void send_words(const void* host, void* device, std::int64_t count, cudaStream_t stream);

/// Room `device_subset` and `device_probabilities` take of a workspace.
[[nodiscard]] std::int64_t subset_words(const StepCaps& caps);

/// Device form of a subset; its ids take a slice of `arena` unless they are consecutive.
[[nodiscard]] DeviceSubset device_subset(const SeqSubset& seqs, Arena& arena, cudaStream_t stream);

/// Device form of p [B, Hq]; takes a slice unless all of the subset's are equal. `p` may be null.
[[nodiscard]] DeviceProbabilities device_probabilities(const float* p, const SeqSubset& seqs,
                                                       std::int32_t num_seqs,
                                                       std::int32_t num_q_heads, Arena& arena,
                                                       cudaStream_t stream);

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_HOST_WORDS_H_
