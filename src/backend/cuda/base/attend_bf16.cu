#include "backend/cuda/base/attend.cuh"

namespace twilight::cuda::base {

void launch_attend_bf16(const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  launch_attend_for<__nv_bfloat16>(args, grid, stream);
}

}  // namespace twilight::cuda::base
