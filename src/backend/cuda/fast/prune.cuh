#ifndef TWILIGHT_BACKEND_CUDA_FAST_PRUNE_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_PRUNE_CUH_

#include "backend/cuda/fast/select.cuh"

/// Top-p over the weights: a mass histogram over logarithmic bins (32 an octave), then an exact
/// finish among the weights of the boundary bin. Masses are integers of 2^30 for a row, so sums do
/// not depend on order. Too many weights in the boundary bin: two more histograms on the rest of
/// their bits. The lists of kept tokens follow from 16-bit masks of pages.
namespace twilight::cuda_fast {

inline constexpr float kRowMass = 1073741824.0F;  // 2^30

/// What a weight of each head counts in the row that is pruned.
template <class C>
struct Factors {
  float of[C::kHeads];
};

template <class C>
__device__ __forceinline__ float mixed_weight(const float (&w)[C::kHeads],
                                              const Factors<C>& factor) {
  float u = w[0] * factor.of[0];
#pragma unroll
  for (int h = 1; h < C::kHeads; ++h) u = fmaf(w[h], factor.of[h], u);
  return u;
}

__device__ __forceinline__ int mass_bin(float u) {
  return min(max((static_cast<int>(__float_as_uint(u)) >> 18) - (127 << 5), 0), kBins - 1);
}

/// Calls f(mixed weight) for this block's tokens: half pages thread by thread, in 16-byte chunks of
/// 8 / kHeads tokens whose rotated order keeps lanes off each other's banks.
template <class C, class F>
__device__ __forceinline__ void for_tokens(const Step<C>& step, const Factors<C>& factor,
                                           const F& f) {
#pragma unroll 1
  for (int half = step.tid(); half < 2 * step.owned(); half += C::kThreads) {
    constexpr int kTokens = 8 / C::kHeads;
    const auto* chunks =
        reinterpret_cast<const uint4*>(step.weights() + static_cast<long>(half) * 8 * C::kHeads);
#pragma unroll
    for (int c = 0; c < C::kHeads; ++c) {
      const uint4 v = chunks[(c + half * C::kHeads / 8) % C::kHeads];
      const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        float w[C::kHeads];
#pragma unroll
        for (int h = 0; h < C::kHeads; ++h) {
          const int e = token * C::kHeads + h;
          w[h] = __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000U);
        }
        f(mixed_weight<C>(w, factor));
      }
    }
  }
}

/// The k-th largest weight as bits (the last one dropped), by counts. Only for rows whose top-p set
/// is smaller than the least number of tokens.
template <class C>
__device__ __noinline__ std::uint32_t count_threshold(const Step<C> step,
                                                      const Factors<C> factor,
                                                      std::uint32_t want) {
  std::uint32_t prefix = 0;
  std::uint32_t above = 0;
#pragma unroll 1
  for (int level = 0; level < 3; ++level) {
    const int shift = 21 - 10 * level;
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) step.histogram()[i] = 0;
    cluster_sync<C::kCluster>();
    for_tokens(step, factor, [&](float u) {
      const std::uint32_t bits = __float_as_uint(u);
      if (level > 0 && bits >> (shift + 10) != prefix) return;
      for (int r = 0; r < C::kCluster; ++r) {
        add_u32<C::kCluster>(&step.histogram()[bits >> shift & 1023U], r, 1U);
      }
    });
    cluster_sync<C::kCluster>();
    const Boundary b = find_boundary<kBins, false>(step.histogram(), want - above, 0, 0,
                                                   [](int, std::uint32_t) { return 0U; });
    prefix = prefix << (level == 0 ? 0 : 10) | static_cast<std::uint32_t>(max(b.bin, 0));
    above += b.above;
    cluster_sync<C::kCluster>();
  }
  return prefix << 1;
}

/// Exact threshold inside the boundary bin by its remaining 18 bits, in two histograms.
template <class C>
__device__ __noinline__ std::uint32_t refine_threshold(const Step<C> step,
                                                       const Factors<C> factor, int bin,
                                                       std::uint32_t above, std::uint32_t target) {
  std::uint32_t prefix = static_cast<std::uint32_t>(bin + (127 << 5));
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    const int shift = 9 - 9 * level;
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) step.histogram()[i] = 0;
    cluster_sync<C::kCluster>();
    for_tokens(step, factor, [&](float u) {
      const std::uint32_t bits = __float_as_uint(u);
      if (bits >> (shift + 9) != prefix) return;
      for (int r = 0; r < C::kCluster; ++r) {
        add_u32<C::kCluster>(&step.histogram()[bits >> shift & 511U], r, __float2uint_rn(u));
      }
    });
    cluster_sync<C::kCluster>();
    const Boundary b = find_boundary<kBins, false>(step.histogram(), target - above, 0, 0,
                                                   [](int, std::uint32_t) { return 0U; });
    prefix = prefix << 9 | static_cast<std::uint32_t>(max(b.bin, 0));
    above += b.above;
    cluster_sync<C::kCluster>();
  }
  return prefix;
}

/// Bits of the smallest kept weight of the top-p set of sum_h factor_h w_h.
template <class C>
__device__ std::uint32_t top_p_threshold(const Step<C>& step, const Factors<C>& factor,
                                         float p) {
  Fixed<C>& s = step.s;
  if (p >= 1.0F) return 0;
  const std::uint32_t tokens =
      static_cast<std::uint32_t>(step.sealed_candidates()) * kPage +
      (step.candidates() > step.sealed_candidates() ? static_cast<std::uint32_t>(step.n() % kPage) : 0U);
#pragma unroll 1
  for (int i = step.tid(); i < kBins; i += C::kThreads) step.histogram()[i] = 0;
#pragma unroll 1
  for (int i = step.tid(); i < kBoundaryList; i += C::kThreads) step.boundary()[i] = 0;
  if (step.tid() == 0) {
    s.mass_total = 0;
    s.list_count = 0;
    s.above_count = 0;
    s.count = 0;
    s.threshold[0] = 0xffffffffU;
  }
  cluster_sync<C::kCluster>();
  // Weights that cannot be kept: together they hold less than half of 1 - p.
  float least = 0.5F * (1.0F - p) * kRowMass / static_cast<float>(max(tokens, 1U));
  if (least < 2.0F) least = -1.0F;
  std::uint32_t mass = 0;
  for_tokens(step, factor, [&](float u) {
    const std::uint32_t m = __float2uint_rn(u);
    mass += m;
    if (u > least) {
      for (int r = 0; r < C::kCluster; ++r) {
        add_u32<C::kCluster>(&step.histogram()[mass_bin(u)], r, m);
      }
    }
  });
  mass = __reduce_add_sync(kFullMask, mass);
  if (step.lane() < C::kCluster) add_u32<C::kCluster>(&s.mass_total, step.lane(), mass);
  cluster_sync<C::kCluster>();
  if (step.warp() == 0) {
    const auto target =
        static_cast<std::uint32_t>(ceil(static_cast<double>(p) * s.mass_total));
    const Boundary b = find_boundary<kBins, false>(step.histogram(), max(target, 1U), 0, 0,
                                                   [](int, std::uint32_t) { return 0U; });
    if (step.lane() == 0) {
      s.found[0] = static_cast<std::uint32_t>(b.bin);
      s.found[1] = b.above;
      s.found[2] = max(target, 1U);
    }
  }
  __syncthreads();
  const int bin = static_cast<int>(s.found[0]);
  const std::uint32_t above = s.found[1];
  const std::uint32_t target = s.found[2];
  // Below one unit bins are cut off; such rows keep every candidate.
  if (bin <= 0) return 0;

  constexpr std::uint32_t kSegment = kBoundaryList / C::kCluster;
  std::uint32_t higher = 0;
  const std::uint32_t lower_bits = static_cast<std::uint32_t>(bin + (127 << 5)) << 18;
  for_tokens(step, factor, [&](float u) {
    const std::uint32_t bits = __float_as_uint(u);
    if (bits < lower_bits) return;
    if (bits >= lower_bits + (1U << 18)) {
      ++higher;
      return;
    }
    const std::uint32_t at = atomicAdd(&s.list_count, 1U);
    if (at >= kSegment) return;
    for (int r = 0; r < C::kCluster; ++r) {
      put_u32<C::kCluster>(&step.boundary()[static_cast<std::uint32_t>(step.rank()) * kSegment + at],
                           r, bits);
    }
  });
  higher = __reduce_add_sync(kFullMask, higher);
  if (step.lane() < C::kCluster) add_u32<C::kCluster>(&s.above_count, step.lane(), higher);
  __syncthreads();
  if (step.tid() < C::kCluster) {
    put_u32<C::kCluster>(&s.segments[step.rank()], step.tid(), s.list_count);
  }
  cluster_sync<C::kCluster>();
  std::uint32_t longest = 0;
#pragma unroll
  for (int r = 0; r < C::kCluster; ++r) longest = max(longest, s.segments[r]);
  std::uint32_t threshold;
  std::uint32_t count = s.above_count;
  if (longest > kSegment) {
    threshold = refine_threshold(step, factor, bin, above, target);
    count = 0xffffffffU;  // a full list: more than enough unless min_tokens is larger still
    if (step.args.min_tokens > static_cast<int>(kSegment)) {
      for_tokens(step, factor, [&](float u) {
        if (__float_as_uint(u) < threshold) return;
        for (int r = 0; r < C::kCluster; ++r) add_u32<C::kCluster>(&s.count, r, 1U);
      });
      cluster_sync<C::kCluster>();
      count = s.count;
    }
  } else {
    // A weight is kept where the mass strictly above it is still short of the target.
#pragma unroll 1
    for (int i = step.tid(); i < kBoundaryList; i += C::kThreads) {
      const std::uint32_t mine = step.boundary()[i];
      if (mine == 0) continue;
      std::uint32_t sum = above;
#pragma unroll
      for (int r = 0; r < C::kCluster; ++r) {
        for (std::uint32_t j = 0; j < s.segments[r]; ++j) {
          const std::uint32_t other = step.boundary()[static_cast<std::uint32_t>(r) * kSegment + j];
          if (other > mine) sum += __float2uint_rn(__uint_as_float(other));
        }
      }
      if (sum < target) {
        atomicMin(&s.threshold[0], mine);
      }
    }
    __syncthreads();
    threshold = s.threshold[0];
#pragma unroll 1
    for (int i = step.tid(); i < kBoundaryList; i += C::kThreads) {
      const std::uint32_t mine = step.boundary()[i];
      if (mine != 0 && mine >= threshold) atomicAdd(&s.count, 1U);
    }
    __syncthreads();
    count += s.count;
  }
  const auto least_tokens = static_cast<std::uint32_t>(max(step.args.min_tokens, 0));
  if (count < least_tokens) {
    threshold = count_threshold(step, factor, min(least_tokens, tokens));
  }
  return threshold;
}

/// Masks of kept tokens and dropped weights of this block's pages, then the list of kept rows in
/// ascending order. Returns their number.
template <class C>
__device__ int prune(const Step<C>& step) {
  Fixed<C>& s = step.s;
  const StepArgs& args = step.args;
  const int group = args.group;
  Factors<C> factor;
  std::uint32_t threshold[C::kPaper ? C::kHeads : 1];
  const float* p = args.p + static_cast<std::int64_t>(step.problem()) * group;
  if constexpr (C::kPaper) {
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) threshold[h] = 0xffffffffU;
    for (int h = 0; h < group; ++h) {
#pragma unroll
      for (int i = 0; i < C::kHeads; ++i) factor.of[i] = i == h ? kRowMass / s.head_sum[h] : 0.0F;
      const std::uint32_t found = top_p_threshold(step, factor, p[h]);
#pragma unroll
      for (int i = 0; i < C::kHeads; ++i) threshold[i] = i == h ? found : threshold[i];
      cluster_sync<C::kCluster>();
    }
#pragma unroll
    for (int i = 0; i < C::kHeads; ++i) factor.of[i] = i < group ? kRowMass / s.head_sum[i] : 0.0F;
  } else {
    float largest = 0;
    for (int h = 0; h < group; ++h) largest = fmaxf(largest, p[h]);
#pragma unroll
    for (int i = 0; i < C::kHeads; ++i) {
      factor.of[i] = i < group ? kRowMass / (s.head_sum[i] * static_cast<float>(group)) : 0.0F;
    }
    threshold[0] = top_p_threshold(step, factor, largest);
  }

  const int recent = (step.sealed() - args.recent_pages) * kPage;
  // Half pages by thread pairs; a warp's pass covers 16 pages in a row.
  const int groups = (step.owned() + kPage - 1) / kPage;
#pragma unroll 1
  for (int i = step.warp(); i < groups; i += C::kWarps) {
    const int local = kPage * i + step.lane() / 2;
    const int half = step.lane() % 2;
    const bool exists = local < step.owned();
    std::uint32_t mask = 0;
    std::uint32_t own[C::kPaper ? C::kHeads : 1] = {};
    float dropped[C::kHeads] = {};
    if (exists) {
      const int page = step.candidate_pages()[step.begin() + local];
      const int token0 = page * kPage + 8 * half;
      constexpr int kTokens = 8 / C::kHeads;
      const auto* chunks = reinterpret_cast<const uint4*>(
          step.weights() + static_cast<long>(2 * local + half) * 8 * C::kHeads);
#pragma unroll
      for (int c = 0; c < C::kHeads; ++c) {
        const int chunk = (c + (2 * local + half) * C::kHeads / 8) % C::kHeads;
        const uint4 v = chunks[chunk];
        const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
          float w[C::kHeads];
#pragma unroll
          for (int h = 0; h < C::kHeads; ++h) {
            const int e = k * C::kHeads + h;
            w[h] = __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000U);
          }
          const int bit = chunk * kTokens + k;
          const int token = token0 + bit;
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
          mask |= (keep ? 1U : 0U) << bit;
#pragma unroll
          for (int h = 0; h < C::kHeads; ++h) dropped[h] += keep ? 0.0F : w[h];
        }
      }
    }
    mask <<= 8 * half;
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
      for (int h = 0; h < C::kHeads; ++h) step.page_values()[local * C::kHeads + h] = dropped[h];
    }
    const std::uint32_t kept =
        __reduce_add_sync(kFullMask, half == 0 ? static_cast<std::uint32_t>(__popc(mask)) : 0U);
    if (step.lane() == 0) s.group_counts[i] = kept;
  }
  __syncthreads();

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
        put_u32<C::kCluster>(&s.kept_totals[step.rank()], step.tid(), static_cast<std::uint32_t>(total));
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
      before += __reduce_add_sync(kFullMask, j + step.lane() < i ? s.group_counts[j + step.lane()] : 0U);
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
      step.rows()[at] = row + static_cast<std::uint32_t>(slot);
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
