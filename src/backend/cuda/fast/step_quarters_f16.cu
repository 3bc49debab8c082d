#include "backend/cuda/fast/step_launch.cuh"

namespace twilight::cuda_fast {

cudaError_t launch_quarters_f16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s) {
  return launch_scheme<Scheme::kQuarters, Half>(launch, args, s);
}

}  // namespace twilight::cuda_fast
