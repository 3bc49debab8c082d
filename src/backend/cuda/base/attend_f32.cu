#include "backend/cuda/base/attend.cuh"

namespace twilight::cuda::base {

void launch_attend_f32(const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  launch_attend_for<float>(args, grid, stream);
}

}  // namespace twilight::cuda::base
