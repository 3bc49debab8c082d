#ifndef TWILIGHT_BACKEND_CUDA_CUDA_CHECK_H_
#define TWILIGHT_BACKEND_CUDA_CUDA_CHECK_H_

#include <cuda_runtime_api.h>

namespace twilight::cuda {

/// Throws Error(kInternal), or kOutOfMemory, that quotes the call.
void check_cuda(cudaError_t status, const char* call);
/// The same for the launch just made.
void check_launch(const char* kernel);

}  // namespace twilight::cuda

/// Runs a CUDA call and throws where it fails.
#define TWILIGHT_CUDA(call) ::twilight::cuda::check_cuda((call), #call)

#endif  // TWILIGHT_BACKEND_CUDA_CUDA_CHECK_H_
