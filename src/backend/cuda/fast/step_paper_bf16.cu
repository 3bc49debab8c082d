#include "backend/cuda/fast/step_launch.cuh"

namespace twilight::cuda_fast {

cudaError_t launch_paper_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s) {
  return launch_scheme<Scheme::kPaper, Bf16>(launch, args, s);
}

}  // namespace twilight::cuda_fast
