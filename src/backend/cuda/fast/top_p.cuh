#ifndef TWILIGHT_BACKEND_CUDA_FAST_TOP_P_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_TOP_P_CUH_

#include "backend/cuda/fast/row_thresholds.cuh"

/// Top-p over the weights: a mass histogram over logarithmic bins (32 an octave), then an exact
/// finish among the weights of the boundary bin. Masses are integers of 2^30 for a row, so sums do
/// not depend on order. Too many weights in the boundary bin: two more histograms on the rest of
/// their bits.
namespace twilight::cuda_fast {

/// Only one row's factors.
template <class C>
__device__ __forceinline__ Factors<C> factors_of_row(const Factors<C>& factor, int row) {
  Factors<C> out = factor;
  if constexpr (C::kPaper) {
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) out.of[h] = h == row ? factor.of[h] : 0.0F;
  }
  return out;
}

/// Clears what pruning counts in.
template <class C>
__device__ void clear_prune_bins(const Step<C>& step) {
  Fixed<C>& s = step.s;
#pragma unroll 1
  for (int i = step.tid(); i < kPruneRows<C> * kBins; i += C::kThreads) step.histogram()[i] = 0;
#pragma unroll 1
  for (int i = step.tid(); i < kPruneRows<C> * kBoundaryList; i += C::kThreads) {
    step.boundary()[i] = 0;
  }
  if (step.tid() < 8) {
    s.mass_total[step.tid()] = 0;
    s.list_count[step.tid()] = 0;
    s.above_count[step.tid()] = 0;
    s.count[step.tid()] = 0;
    s.threshold[step.tid()] = 0xffffffffU;
  }
}

/// Leaves the bits of the smallest kept weight of each row's top-p set in `threshold`. Bins are
/// clear.
template <class C>
__device__ void top_p_thresholds(const Step<C>& step, const Factors<C>& factor) {
  constexpr int kRows = kPruneRows<C>;
  Fixed<C>& s = step.s;
  const int rows = C::kPaper ? step.args.group : 1;
  const std::uint32_t tokens = static_cast<std::uint32_t>(step.sealed_candidates()) * kPage +
                               static_cast<std::uint32_t>(step.n() % kPage);
  // Weights that cannot be kept: together they hold less than half of 1 - p.
  float least[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    least[r] = 0.5F * (1.0F - s.p[r]) * kRowMass / static_cast<float>(max(tokens, 1U));
    if (least[r] < 2.0F) least[r] = -1.0F;
    if (r >= rows || s.p[r] >= 1.0F) least[r] = INFINITY;
  }
  std::uint32_t mass[kRows] = {};
  for_tokens(step, [&](const float(&w)[C::kHeads]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float u = row_weight<C>(w, factor, r);
      const std::uint32_t m = __float2uint_rn(u);
      mass[r] += m;
      if (u > least[r]) {
        for (int k = 0; k < C::kCluster; ++k) {
          const int to = (step.rank() + k) % C::kCluster;  // no two blocks at one target
          add_u32<C::kCluster>(&step.histogram()[r * kBins + mass_bin(u)], to, m);
        }
      }
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    mass[r] = __reduce_add_sync(kFullMask, mass[r]);
    if (step.lane() < C::kCluster) add_u32<C::kCluster>(&s.mass_total[r], step.lane(), mass[r]);
  }
  cluster_sync<C::kCluster>();
  step.stamp(11);
  if (step.warp() < rows) {
    const int r = step.warp();
    // p in steps of 2^-24, rounded up; exact for p of a half and more.
    const auto share = static_cast<std::uint64_t>(__float2uint_ru(s.p[r] * 16777216.0F));
    const auto target =
        max(static_cast<std::uint32_t>((share * s.mass_total[r] + 0xffffffU) >> 24), 1U);
    const Boundary b = find_boundary<kBins, false>(step.histogram() + r * kBins, target, 0, 0,
                                                   [](int, std::uint32_t) { return 0U; });
    if (step.lane() == 0) {
      // Below one unit bins are cut off; such rows keep every candidate.
      s.row_bin[r] = s.p[r] >= 1.0F ? 0 : max(b.bin, 0);
      s.row_above[r] = b.above;
      s.row_target[r] = target;
    }
  }
  __syncthreads();

  step.stamp(12);
  constexpr std::uint32_t kSegment = kBoundaryList / C::kCluster;
  std::uint32_t higher[kRows] = {};
  std::uint32_t lower_bits[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int bin = r < rows ? s.row_bin[r] : 0;
    lower_bits[r] = bin > 0 ? bin_edge(bin) : 0xffffffffU;
  }
  for_tokens(step, [&](const float(&w)[C::kHeads]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const std::uint32_t bits = __float_as_uint(row_weight<C>(w, factor, r));
      if (bits < lower_bits[r]) continue;
      if (bits >= lower_bits[r] + (1U << kBinShift)) {
        ++higher[r];
        continue;
      }
      const std::uint32_t at = atomicAdd(&s.list_count[r], 1U);
      if (at >= kSegment) continue;
      for (int to = 0; to < C::kCluster; ++to) {
        put_u32<C::kCluster>(
            &step.boundary()[static_cast<std::uint32_t>(r) * kBoundaryList +
                             static_cast<std::uint32_t>(step.rank()) * kSegment + at],
            to, bits);
      }
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    higher[r] = __reduce_add_sync(kFullMask, higher[r]);
    if (step.lane() < C::kCluster) add_u32<C::kCluster>(&s.above_count[r], step.lane(), higher[r]);
  }
  __syncthreads();
  if constexpr (C::kCluster > 1) {
    for (int i = step.tid(); i < C::kCluster * rows; i += C::kThreads) {
      put_u32<C::kCluster>(&s.segments[step.rank()][i % rows], i / rows, s.list_count[i % rows]);
    }
    cluster_sync<C::kCluster>();
  }
  const auto segment_of = [&](int rank, int row) {
    return C::kCluster == 1 ? s.list_count[row] : s.segments[rank][row];
  };
  step.stamp(13);
  // A weight is kept where the mass strictly above it is still short of the target.
#pragma unroll 1
  for (int i = step.tid(); i < rows * kBoundaryList; i += C::kThreads) {
    const std::uint32_t mine = step.boundary()[i];
    if (mine == 0) continue;
    const int row = i / kBoundaryList;
    std::uint32_t sum = s.row_above[row];
#pragma unroll 1
    for (int r = 0; r < C::kCluster; ++r) {
      const std::uint32_t* list =
          step.boundary() + row * kBoundaryList + r * static_cast<int>(kSegment);
      const std::uint32_t length = min(segment_of(r, row), kSegment);
#pragma unroll 4
      for (std::uint32_t j = 0; j < length; ++j) {
        const std::uint32_t other = list[j];
        if (other > mine) sum += __float2uint_rn(__uint_as_float(other));
      }
    }
    if (sum < s.row_target[row]) {
      atomicMin(&s.threshold[row], mine);
      atomicAdd(&s.count[row], 1U);
    }
  }
  __syncthreads();
  step.stamp(14);
  // The rare rows: too many weights in the boundary bin, too few tokens, p = 1.
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    std::uint32_t longest = 0;
    for (int from = 0; from < C::kCluster; ++from) longest = max(longest, segment_of(from, r));
    std::uint32_t threshold = s.threshold[r];
    std::uint32_t count = s.count[r] + s.above_count[r];
    const bool all = s.row_bin[r] == 0;
    const bool full = !all && longest > kSegment;
    const auto least_tokens = min(static_cast<std::uint32_t>(max(step.args.min_tokens, 0)), tokens);
    if (!all && !full && count >= least_tokens) continue;
    const Factors<C> mine = factors_of_row(factor, r);
    if (all) {
      threshold = 0;
    } else if (full) {
      threshold = refine_threshold(step, mine, s.row_bin[r], s.row_above[r], s.row_target[r]);
      std::uint32_t kept = 0;
      for_tokens(step, [&](const float(&w)[C::kHeads]) {
        kept += __float_as_uint(mixed_weight<C>(w, mine)) >= threshold ? 1U : 0U;
      });
      kept = __reduce_add_sync(kFullMask, kept);
      if (step.tid() == 0) s.count[r] = 0;
      cluster_sync<C::kCluster>();
      if (step.lane() < C::kCluster) add_u32<C::kCluster>(&s.count[r], step.lane(), kept);
      cluster_sync<C::kCluster>();
      count = s.count[r];
    }
    if (!all && count < least_tokens) {
      threshold = full ? 0 : near_count_threshold(step, mine, r, least_tokens);
      if (threshold == 0) threshold = count_threshold(step, mine, least_tokens);
    }
    cluster_sync<C::kCluster>();
    if (step.tid() == 0) s.threshold[r] = threshold;
    __syncthreads();
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_TOP_P_CUH_
