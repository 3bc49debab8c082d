#ifndef TWILIGHT_BACKEND_CUDA_FAST_SAMPLE_H_
#define TWILIGHT_BACKEND_CUDA_FAST_SAMPLE_H_

#include <cuda_runtime_api.h>

#include "ops/block_params.h"

namespace twilight::cuda_fast {

/// SampleRowsParams on device memory; without draws the largest of each row. `clusters`: whether
/// the device has them (sm_90 and later).
void sample_rows(const SampleRowsParams& params, bool clusters, cudaStream_t stream);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_SAMPLE_H_
