#ifndef TWILIGHT_BACKEND_CUDA_READ_THROUGH_H_
#define TWILIGHT_BACKEND_CUDA_READ_THROUGH_H_

#include <cstddef>

#include <cuda_runtime_api.h>

namespace twilight::cuda {

/// Reads device memory once, 16 bytes a lane; for measuring bandwidth. Bytes past the last multiple
/// of 16 are left out.
void read_through(const std::byte* data, std::size_t bytes, cudaStream_t stream);

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_READ_THROUGH_H_
