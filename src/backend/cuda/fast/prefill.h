#ifndef TWILIGHT_BACKEND_CUDA_FAST_PREFILL_H_
#define TWILIGHT_BACKEND_CUDA_FAST_PREFILL_H_

#include <cuda_runtime_api.h>

#include "ops/params.h"

/// Causal attention of a run of new tokens over the paged cache on tensor cores: queries and
/// weights are rounded to the cache's dtype.
namespace twilight::cuda_fast {

/// D 64 or 128, bf16 or f16, rows on 16-byte boundaries, not full_precision.
[[nodiscard]] bool prefill_supports(const AttendPrefillParams& params);
void prefill(const AttendPrefillParams& params, cudaStream_t stream);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_PREFILL_H_
