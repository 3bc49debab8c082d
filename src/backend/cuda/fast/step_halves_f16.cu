#include "backend/cuda/fast/step_launch.cuh"

namespace twilight::cuda_fast {

cudaError_t launch_halves_f16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s) {
  return launch_scheme<Scheme::kHalves, Half>(launch, args, s);
}

}  // namespace twilight::cuda_fast
