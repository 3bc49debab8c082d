#ifndef TWILIGHT_BACKEND_CUDA_FAST_PRUNE_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_PRUNE_CUH_

#include "backend/cuda/fast/top_p.cuh"

/// Lists of kept tokens from the thresholds of top_p.cuh, by way of 16-bit masks of pages.
namespace twilight::cuda_fast {

/// Masks of kept tokens and dropped weights of this block's pages, then the list of kept rows in
/// ascending order. Returns their number.
template <class C>
__device__ int prune(const Step<C>& step) {
  Fixed<C>& s = step.s;
  const StepArgs& args = step.args;
  const int group = args.group;
  Factors<C> factor;
#pragma unroll
  for (int i = 0; i < C::kHeads; ++i) {
    factor.of[i] = i < group
                       ? kRowMass / (s.head_sum[i] * (C::kPaper ? 1.0F : static_cast<float>(group)))
                       : 0.0F;
  }
  top_p_thresholds(step, factor);
  std::uint32_t threshold[kPruneRows<C>];
#pragma unroll
  for (int r = 0; r < kPruneRows<C>; ++r) {
    threshold[r] = !C::kPaper || r < group ? s.threshold[r] : 0xffffffffU;
  }

  const int recent = (step.sealed() - args.recent_pages) * kPage;
  // Half pages by thread pairs; a warp's pass covers 16 pages in a row.
  const int groups = (step.owned() + kPage - 1) / kPage;
  float dropped_sum[C::kHeads] = {};
#pragma unroll 1
  for (int i = step.warp(); i < groups; i += C::kWarps) {
    const int local = kPage * i + step.lane() / 2;
    const int half = step.lane() % 2;
    const bool exists = local < step.owned();
    std::uint32_t mask = 0;
    std::uint32_t own[C::kPaper ? C::kHeads : 1] = {};
    float dropped[C::kHeads] = {};
    if (exists) {
      const int token0 = step.candidate_pages()[step.begin() + local] * kPage;
      const auto judge = [&](int slot, const float(&w)[C::kHeads]) {
        const int token = token0 + slot;
        const bool forced = token < args.sink_tokens || token >= recent;
        const bool valid = token < step.n();
        bool keep = forced;
        if constexpr (C::kPaper) {
#pragma unroll
          for (int h = 0; h < C::kHeads; ++h) {
            const bool mine = __float_as_uint(w[h] * factor.of[h]) >= threshold[h];
            keep = keep || mine;
            own[h] += valid && (mine || forced) ? 1U : 0U;
          }
        } else {
          keep = keep || __float_as_uint(mixed_weight<C>(w, factor)) >= threshold[0];
        }
        keep = keep && valid;
        mask |= (keep ? 1U : 0U) << slot;
#pragma unroll
        for (int h = 0; h < C::kHeads; ++h) dropped[h] += keep ? 0.0F : w[h];
      };
      for_half_page(step, 2 * local + half,
                    [&](int slot, const float(&low)[C::kHeads], const float(&high)[C::kHeads]) {
                      judge(slot, low);
                      judge(slot + 8, high);
                    });
    }
    if (exists && args.tail && local < step.owned_sealed()) {
      prefetch_line(step.record(half == 0 ? kValueMeans : kParams, step.physical()[local]));
    }
    mask |= __shfl_xor_sync(kFullMask, mask, 1);
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) dropped[h] += __shfl_xor_sync(kFullMask, dropped[h], 1);
    if constexpr (C::kPaper) {
#pragma unroll
      for (int h = 0; h < C::kHeads; ++h) {
        const std::uint32_t count = __reduce_add_sync(kFullMask, own[h]);
        if (step.lane() == 0 && args.head_counts != nullptr && h < group) {
          for (int r = 0; r < C::kCluster; ++r) add_u32<C::kCluster>(&s.own_count[h], r, count);
        }
      }
    }
    if (exists && half == 0) {
      step.masks()[local] = static_cast<std::uint16_t>(mask);
#pragma unroll
      for (int h = 0; h < C::kHeads; ++h) {
        step.page_values()[local * C::kHeads + h] = dropped[h];
        dropped_sum[h] += dropped[h];
        if (args.tail_mass != nullptr && h < group) {
          args.tail_mass[(static_cast<std::int64_t>(step.problem()) * group + h) *
                             args.candidate_stride +
                         step.begin() + local] = dropped[h] * exp2_fast(s.norm[h] - s.head_max[h]);
        }
      }
    }
    const std::uint32_t kept =
        __reduce_add_sync(kFullMask, half == 0 ? static_cast<std::uint32_t>(__popc(mask)) : 0U);
    if (step.lane() == 0) s.group_counts[i] = kept;
  }
  if (args.head_mass != nullptr) {
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) {
      const float sum = warp_sum(dropped_sum[h]);
      if (step.lane() == 0) s.reduce[step.warp()][h].y = sum;
    }
  }
  if (args.tail_shift != nullptr && step.rank() == 0 && step.tid() < group) {
    args.tail_shift[step.problem() * group + step.tid()] = s.head_max[step.tid()] * kLn2;
  }
  __syncthreads();
  if (args.head_mass != nullptr && step.tid() < group) {
    float sum = 0;
    for (int w = 0; w < C::kWarps; ++w) sum += s.reduce[w][step.tid()].y;
    put_float<C::kCluster>(&s.dropped_mass[step.rank()][step.tid()], 0, sum);
  }

  step.stamp(15);
  // Weights are done with: rows may take their place.
  int total = 0;
#pragma unroll 1
  for (int i = 0; i < groups; i += 32) {
    const std::uint32_t count = i + step.lane() < groups ? s.group_counts[i + step.lane()] : 0;
    total += static_cast<int>(__reduce_add_sync(kFullMask, count));
  }
  int list_begin = 0;
  if (args.kept != nullptr || args.kept_counts != nullptr) {
    int all = total;
    if constexpr (C::kCluster > 1) {
      if (step.tid() < C::kCluster) {
        put_u32<C::kCluster>(&s.kept_totals[step.rank()], step.tid(),
                             static_cast<std::uint32_t>(total));
      }
      cluster_sync<C::kCluster>();
      all = 0;
      for (int r = 0; r < C::kCluster; ++r) {
        if (r < step.rank()) list_begin += static_cast<int>(s.kept_totals[r]);
        all += static_cast<int>(s.kept_totals[r]);
      }
    }
    if (step.tid() == 0 && step.rank() == 0 && args.kept_counts != nullptr) {
      args.kept_counts[step.problem()] = all;
    }
    if (step.rank() == 0 && step.tid() < group && args.head_counts != nullptr) {
      args.head_counts[step.problem() * group + step.tid()] =
          C::kPaper ? static_cast<std::int32_t>(s.own_count[step.tid()]) : all;
    }
  }
#pragma unroll 1
  for (int i = step.warp(); i < groups; i += C::kWarps) {
    std::uint32_t before = 0;
#pragma unroll 1
    for (int j = 0; j < i; j += 32) {
      before +=
          __reduce_add_sync(kFullMask, j + step.lane() < i ? s.group_counts[j + step.lane()] : 0U);
    }
    const int local = kPage * i + step.lane() / 2;
    const int half = step.lane() % 2;
    const std::uint32_t mask =
        local < step.owned() ? (std::uint32_t{step.masks()[local]} >> (8 * half)) & 255U : 0U;
    const auto count = static_cast<std::uint32_t>(__popc(mask));
    std::uint32_t at = before + warp_prefix(count) - count;
    if (mask == 0) continue;
    const auto row = static_cast<std::uint32_t>(step.physical()[local]) * kPage;
    const int token0 = step.candidate_pages()[step.begin() + local] * kPage;
    for (std::uint32_t bits = mask; bits != 0; bits &= bits - 1) {
      const int slot = 8 * half + __ffs(static_cast<int>(bits)) - 1;
      const std::uint32_t id = row + static_cast<std::uint32_t>(slot);
      step.rows()[at] = id;
      if (args.kept != nullptr) {
        args.kept[step.problem() * args.kept_stride + list_begin + at] = token0 + slot;
      }
      ++at;
    }
  }
  return total;
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_PRUNE_CUH_
