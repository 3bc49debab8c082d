#include "backend/cuda/cuda_check.h"

#include "core/check.h"

namespace twilight::cuda {

void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) [[likely]]
    return;
  const auto code =
      status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal;
  fail(code, "cuda", call, ": ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}

void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

}  // namespace twilight::cuda
