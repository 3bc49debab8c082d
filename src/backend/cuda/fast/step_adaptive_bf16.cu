#include "backend/cuda/fast/step_launch.cuh"

namespace twilight::cuda_fast {

cudaError_t launch_adaptive_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s) {
  return launch_scheme<Scheme::kAdaptive, Bf16>(launch, args, s);
}

}  // namespace twilight::cuda_fast
