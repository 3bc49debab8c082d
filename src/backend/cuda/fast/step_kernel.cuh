#ifndef TWILIGHT_BACKEND_CUDA_FAST_STEP_KERNEL_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_STEP_KERNEL_CUH_

#include "backend/cuda/fast/attend.cuh"
#include "backend/cuda/fast/estimate.cuh"
#include "backend/cuda/fast/prune.cuh"
#include "backend/cuda/fast/quarters.cuh"
#include "backend/cuda/fast/score.cuh"
#include "backend/cuda/fast/select.cuh"

namespace twilight::cuda_fast {

/// A problem without tokens: zeros.
template <class C>
__device__ void write_empty(const Step<C>& step) {
  const StepArgs& args = step.args;
  if (step.rank() != 0) return;
  const std::int64_t row = step.seq() * args.out_seq_stride +
                           static_cast<std::int64_t>(step.kv_head()) * args.group * C::kDim;
#pragma unroll 1
  for (int i = step.tid(); i < args.group * C::kDim; i += C::kThreads) args.out[row + i] = 0.0F;
  if (step.tid() == 0 && args.page_counts != nullptr) args.page_counts[step.problem()] = 0;
  if (step.tid() == 0 && args.kept_counts != nullptr) args.kept_counts[step.problem()] = 0;
  if (step.tid() < args.group) {
    const int head = step.problem() * args.group + step.tid();
    if (args.head_counts != nullptr) args.head_counts[head] = 0;
    if (args.head_mass != nullptr) args.head_mass[head] = 0.0F;
    if (args.tail_shift != nullptr) args.tail_shift[head] = -INFINITY;
  }
}

/// Shift of the weights where no page model gives one: the largest upper bound of a score.
template <class C>
__device__ void bound_norms(const Step<C>& step) {
  std::uint32_t largest = 0;
#pragma unroll 1
  for (int page = step.tid(); page < step.sealed(); page += C::kThreads) {
    largest = max(largest, step.keys()[page]);
  }
  largest = __reduce_max_sync(kFullMask, largest);
  if (step.lane() == 0) step.s.warp_counts[step.warp()] = largest;
  __syncthreads();
  if (step.tid() < 8) {
    std::uint32_t key = 0;
    for (int w = 0; w < C::kWarps; ++w) key = max(key, step.s.warp_counts[w]);
    const float bound = __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffU : ~key);
    step.s.norm[step.tid()] = step.tid() >= step.args.group      ? 1e30F
                              : key != 0 && fabsf(bound) < 1e30F ? bound
                                                                 : 0.0F;
  }
  __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCluster == 1 ? 1024 / C::kThreads : 1)
    step_kernel(const __grid_constant__ StepArgs args) {
#if __CUDA_ARCH__ < 900
  if constexpr (C::kCluster > 1) return;  // never launched there
#endif
  extern __shared__ __align__(128) std::uint8_t memory[];
  const int problem = static_cast<int>(blockIdx.x) / C::kCluster;
  const int row = problem / args.num_kv_heads;
  const Step<C> step{args, memory, *reinterpret_cast<Fixed<C>*>(memory + args.smem.fixed)};
  const int seq = args.seq_ids == nullptr ? args.first_seq + row : args.seq_ids[row];
  const int kv_head = problem % args.num_kv_heads;
  const int n = args.seq_lens[seq];
  FirstLoads<C> first;
  first.load(args, seq, kv_head);
  float p = 0;
  if (step.tid() < args.group) {
    p = args.p == nullptr
            ? args.p_of_all
            : args.p[(static_cast<std::int64_t>(seq) * args.num_kv_heads + kv_head) * args.group +
                     step.tid()];
  }
  if (step.tid() < 8) step.s.own_count[step.tid()] = 0;
  if (step.tid() == 0) {
    step.s.select_total = step.s.select_forced = 0;
    step.s.table = args.block_table + seq * args.table_stride;
  }
  if (step.tid() < kNumPlanes) {
    const Plane& plane = args.planes[step.tid()];
    step.s.planes[step.tid()] = plane.data + kv_head * plane.head_stride;
  }
  clear_select_bins(step);
  if (step.warp() == 0) {
    // Each head's p, or the largest for their mean.
    const float largest = warp_max(p);
    if (step.lane() < 8) step.s.p[step.lane()] = C::kPaper ? p : largest;
    if (step.lane() == 0) step.s.problem = {seq, kv_head, n, 0};
  }
  __syncthreads();
  if (n == 0) {
    write_empty(step);
    return;
  }
  step.stamp(0);
  if constexpr (C::kPaper) {
    score_by_bounds(step, first);
    cluster_sync<C::kCluster>();
    step.stamp(2);
    bound_norms(step);
  } else {
    if constexpr (C::kCentresAgain) {
      score_by_quarters(step, first);
    } else {
      score_by_mass(step, first);
    }
    cluster_sync<C::kCluster>();
    step.stamp(2);
    head_norms(step);
    __syncthreads();
    mass_keys(step);
    cluster_sync<C::kCluster>();
  }
  if (C::kPaper || C::kCluster > 1) {
    const PagePool pool = page_pool(step);
    for (int page = step.tid(); page < step.sealed(); page += C::kThreads) {
      count_key(step, pool, page, step.keys()[page]);
    }
    __syncthreads();
  }
  step.stamp(3);
  select_candidates(step);
  cluster_sync<C::kCluster>();
  step.stamp(4);
  estimate(step);
  step.stamp(5);
  const int kept = prune(step);
  __syncthreads();
  step.stamp(6);
  attend(step, kept);
  step.stamp(10);
  write_head_mass(step);
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_STEP_KERNEL_CUH_
