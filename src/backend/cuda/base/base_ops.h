#ifndef TWILIGHT_BACKEND_CUDA_BASE_BASE_OPS_H_
#define TWILIGHT_BACKEND_CUDA_BASE_BASE_OPS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "backend/cuda/device/subset.cuh"
#include "core/buffer.h"
#include "ops/block_params.h"
#include "ops/params.h"

/// Launchers of the ops for every shape, dtype and index format the backend supports: what runs
/// where no tuned kernel does. All pointers are device memory; `seqs` replaces params.seqs, `p`
/// replaces params.p. Launches only. Grids follow from strides (capacities), never from lengths, so
/// a captured graph stays valid while lengths change.
namespace twilight::cuda::base {

constexpr std::int32_t kMaxHeadDim = 256;

void append_kv(const AppendKvParams& params, cudaStream_t stream);
void seal_pages(const SealPagesParams& params, cudaStream_t stream);
void copy_pages(const CopyPagesParams& params, cudaStream_t stream);

/// Centroid summaries take a slice [B, Hq, pages] of `arena`.
void score_pages(const ScorePagesParams& params, const DeviceSubset& seqs, Arena& arena,
                 cudaStream_t stream);
void exact_scores(const ExactScoresParams& params, const DeviceSubset& seqs, cudaStream_t stream);
void select_pages(const SelectPagesParams& params, const DeviceSubset& seqs, cudaStream_t stream);
void estimate_scores(const EstimateParams& params, const DeviceSubset& seqs, cudaStream_t stream);
void prune_top_p(const PruneParams& params, const DeviceSubset& seqs, const DeviceProbabilities& p,
                 cudaStream_t stream);

/// Floats of partial results that decode attention takes of the arena.
[[nodiscard]] std::int64_t attend_floats(std::int64_t num_seqs, std::int64_t num_q_heads,
                                         std::int64_t head_dim);
void attend_dense(const AttendDenseParams& params, const DeviceSubset& seqs, Arena& arena,
                  cudaStream_t stream);
void attend_sparse(const AttendSparseParams& params, const DeviceSubset& seqs, Arena& arena,
                   cudaStream_t stream);
void attend_prefill(const AttendPrefillParams& params, cudaStream_t stream);

/// Any dtype, alignment and stride; f32 products and sums.
void linear(const LinearParams& params, cudaStream_t stream);
void rms_norm(const RmsNormParams& params, cudaStream_t stream);
void rope(const RopeParams& params, cudaStream_t stream);
void silu_mul(const SiluMulParams& params, cudaStream_t stream);
void embed(const EmbedParams& params, cudaStream_t stream);
void rotation(const RotationParams& params, cudaStream_t stream);
void count_tail(const CountTailParams& params, const DeviceSubset& seqs, cudaStream_t stream);

}  // namespace twilight::cuda::base

#endif  // TWILIGHT_BACKEND_CUDA_BASE_BASE_OPS_H_
