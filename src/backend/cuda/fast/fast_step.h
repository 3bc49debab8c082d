#ifndef TWILIGHT_BACKEND_CUDA_FAST_FAST_STEP_H_
#define TWILIGHT_BACKEND_CUDA_FAST_FAST_STEP_H_

#include <cuda_runtime_api.h>

#include "backend/cuda/device/subset.cuh"
#include "backend/cuda/fast/step_args.h"
#include "ops/backend.h"

/// The sparse decode step as one kernel: scores, selection, estimates, pruning, attention, tail.
namespace twilight::cuda_fast {

/// How a problem (sequence, KV head) is laid over the GPU; 0 chooses by the number of problems.
struct StepShape {
  int threads = 0;  ///< of a block: 512 or 1024
  int cluster = 0;  ///< blocks of a problem: 1, 2 or 8
};

struct StepOptions {
  StepShape shape;
  bool write_lists = true;         ///< fill pages, kept, counts, masses of the parameters
  std::int64_t* stamps = nullptr;  ///< see StepArgs
};

/// Whether the fused step takes these parameters on this device: `paper` or `adaptive` kernels (the
/// criteria and index formats of those presets, kMma order), P = 16, D = 64 or 128, bf16 or f16, a
/// group of at most 8, and lists that fit shared memory. Reads shapes only.
[[nodiscard]] Support fast_step_supports(const SparseStepParams& params, int device,
                                         const StepOptions& options = {});

/// Enqueues the step. All pointers of `params` are device memory; `seqs` stands for its seqs, `p`
/// for its p. Candidate and page capacities come from candidate_stride and score.page_stride.
/// Throws Error(kInvalidArgument) where fast_step_supports says no.
void launch_fast_step(const SparseStepParams& params, const cuda::DeviceSubset& seqs,
                      const cuda::DeviceProbabilities& p, int device, cudaStream_t stream,
                      const StepOptions& options = {});

/// Launch of one instantiation, in step_*.cu.
struct StepLaunch {
  int dim = 0;
  int heads = 0;  ///< 1, 2, 4, 8
  int threads = 0;
  int cluster = 0;
  int problems = 0;
};
using StepLauncher = cudaError_t (*)(const StepLaunch& launch, const StepArgs& args,
                                     cudaStream_t stream);
cudaError_t launch_adaptive_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_adaptive_f16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_halves_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_halves_f16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_quarters_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_quarters_f16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_paper_bf16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);
cudaError_t launch_paper_f16(const StepLaunch& launch, const StepArgs& args, cudaStream_t s);

/// Bytes of Fixed for a launch, in step_layout.cu.
[[nodiscard]] int fixed_bytes(bool paper, int dim, int heads, int threads, int cluster);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_FAST_STEP_H_
