#include "backend/cuda/fast/step_launch.cuh"

namespace twilight::cuda_fast {

cudaError_t launch_quarters_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s) {
  return launch_scheme<Scheme::kQuarters, Bf16>(launch, args, s);
}

}  // namespace twilight::cuda_fast
