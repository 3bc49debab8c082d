#ifndef TWILIGHT_BACKEND_CUDA_FAST_SELECT_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_SELECT_CUH_

#include "backend/cuda/fast/step_state.cuh"

/// Page selection from integer keys: radix counts, then an ordered compaction. Every block of a
/// cluster does the whole of it from its own copy of the keys.
namespace twilight::cuda_fast {

/// Where a histogram, read from its last bin down, first satisfies the stop rule.
struct Boundary {
  int bin = -1;  ///< -1: never
  std::uint32_t above = 0;
  std::uint32_t mass_above = 0;
};

/// One warp. Stops where the sum reaches `want`; with kMass also where it reaches `floor` and the
/// mass reaches `target`. mass_of(bin, sum of the bin).
template <int kCount, bool kMass, class MassOf>
__device__ Boundary find_boundary(const std::uint32_t* bins, std::uint32_t want,
                                  std::uint32_t floor, std::uint32_t target,
                                  const MassOf& mass_of) {
  constexpr int kPer = kCount / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int begin = kCount - (lane + 1) * kPer;
  std::uint32_t sum = 0;
  std::uint32_t mass = 0;
  if constexpr (!kMass && kPer == 32) {
    const auto* quads = reinterpret_cast<const uint4*>(bins + begin);
#pragma unroll
    for (int i = 0; i < kPer / 4; ++i) {
      const uint4 x = quads[(i + lane) & (kPer / 4 - 1)];
      sum += x.x + x.y + x.z + x.w;
    }
  } else {
#pragma unroll 8
    for (int i = 0; i < kPer; ++i) {
      const int bin = begin + ((i + lane) & (kPer - 1));
      const std::uint32_t x = bins[bin];
      sum += x;
      if constexpr (kMass) mass += mass_of(bin, x);
    }
  }
  const std::uint32_t upto = warp_prefix(sum);
  const std::uint32_t mass_upto = kMass ? warp_prefix(mass) : 0;
  const auto stop = [&](std::uint32_t s, std::uint32_t m) {
    return s >= want || (kMass && s >= floor && m >= target);
  };
  const unsigned hits = __ballot_sync(kFullMask, stop(upto, mass_upto));
  Boundary out;
  if (hits == 0) return out;
  const int owner = __ffs(static_cast<int>(hits)) - 1;
  const std::uint32_t above = __shfl_sync(kFullMask, upto - sum, owner);
  const std::uint32_t mass_above = kMass ? __shfl_sync(kFullMask, mass_upto - mass, owner) : 0;
  const int top = kCount - 1 - owner * kPer;
  std::uint32_t x = 0;
  std::uint32_t m = 0;
  if (lane < kPer) {
    x = bins[top - lane];
    if constexpr (kMass) m = mass_of(top - lane, x);
  }
  const std::uint32_t x_upto = above + warp_prefix(x);
  const std::uint32_t m_upto = kMass ? mass_above + warp_prefix(m) : 0;
  const unsigned inner = __ballot_sync(kFullMask, lane < kPer && stop(x_upto, m_upto));
  const int at = __ffs(static_cast<int>(inner)) - 1;
  out.bin = top - at;
  out.above = __shfl_sync(kFullMask, x_upto - x, at);
  out.mass_above = kMass ? __shfl_sync(kFullMask, m_upto - m, at) : 0;
  return out;
}

template <class C>
struct SelectLevels {
  static constexpr int kLevels = C::kPaper ? 3 : 2;
  /// Right shift of a level's prefix; the last level drops two bits of 32-bit keys.
  __device__ static constexpr int shift(int level) {
    return C::kPaper ? 22 - 10 * level : 6 - 6 * level;
  }
  /// Words of the histograms: level i starts at kBins i.
  static constexpr int kAllBins = C::kPaper ? 3 * kBins : kBins + 64;
  __device__ static constexpr int mask(int level) { return !C::kPaper && level == 1 ? 63 : 1023; }
};

/// Share of a page with this key, 2^31 for 1.
__device__ __forceinline__ std::uint32_t key_mass(std::uint32_t key) {
  return __float2uint_rn(
      exp2_fast((static_cast<float>(key) - 65535.0F) * (1.0F / kLogSteps) + 31.0F));
}

/// The sealed pages that compete: all but those with forced tokens.
struct PagePool {
  int first;
  int last;
};
template <class C>
__device__ __forceinline__ PagePool page_pool(const Step<C>& step) {
  const int sealed = step.sealed();
  const int first = min((step.args.sink_tokens + kPage - 1) / kPage, sealed);
  return {first, max(first, sealed - min(step.args.recent_pages, sealed))};
}

/// Clears the histograms of all levels.
template <class C>
__device__ __forceinline__ void clear_select_bins(const Step<C>& step) {
#pragma unroll 1
  for (int i = step.tid(); i < SelectLevels<C>::kAllBins; i += C::kThreads) {
    step.select_histogram()[i] = 0;
  }
  if (step.args.mass > 0) {
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) step.select_mass()[i] = 0;
  }
}

/// Counts a page's key at the first level.
template <class C>
__device__ __forceinline__ void count_key(const Step<C>& step, const PagePool& pool, int page,
                                          std::uint32_t key) {
  const bool by_mass = !C::kPaper && step.args.mass > 0;
  const std::uint32_t mass = by_mass ? key_mass(key) : 0;
  if (by_mass) atomicAdd(&step.s.select_total, mass);
  if (page >= pool.first && page < pool.last) {
    const std::uint32_t bin = key >> SelectLevels<C>::shift(0);
    atomicAdd(&step.select_histogram()[bin], 1U);
    if (by_mass) atomicAdd(&step.select_mass()[bin], mass);
  } else if (by_mass) {
    atomicAdd(&step.s.select_forced, mass);
  }
}

/// Returns the prefix of the last page taken, and leaves in found[3] how many pages with that
/// prefix are: `want` pages of the pool at most, `floor` at least where the mass rule stops
/// earlier. Starts with the first level counted.
template <class C>
__device__ std::uint32_t find_page_threshold(const Step<C>& step, const PagePool& pool, int want,
                                             int floor) {
  using Levels = SelectLevels<C>;
  Fixed<C>& s = step.s;
  const bool by_mass = !C::kPaper && step.args.mass > 0;
  std::uint32_t prefix = 0;
  std::uint32_t above = 0;
  std::uint32_t mass_above = 0;
#pragma unroll 1
  for (int level = 0; level < Levels::kLevels; ++level) {
    std::uint32_t* bins = step.select_histogram() + kBins * level;
    if (level > 0) {
#pragma unroll 1
      for (int page = pool.first + step.tid(); page < pool.last; page += C::kThreads) {
        const std::uint32_t key = step.keys()[page];
        if (key >> Levels::shift(level - 1) != prefix) continue;
        atomicAdd(&bins[(key >> Levels::shift(level)) & Levels::mask(level)], 1U);
      }
      __syncthreads();
    }
    if (step.warp() == 0) {
      Boundary b;
      const auto count = static_cast<std::uint32_t>(want);
      std::uint32_t ties = 0;
      if (by_mass) {
        const double wanted = static_cast<double>(step.args.mass) * s.select_total;
        const double missing = wanted - s.select_forced;
        const auto target = static_cast<std::uint32_t>(missing > 0 ? ceil(missing) : 0.0);
        const std::uint32_t target_left = target > mass_above ? target - mass_above : 0;
        const auto floor_left = static_cast<std::uint32_t>(max(floor - static_cast<int>(above), 0));
        if (level == 0) {
          b = find_boundary<kBins, true>(
              bins, count - above, floor_left, target_left,
              [&](int bin, std::uint32_t) { return step.select_mass()[bin]; });
        } else {
          b = find_boundary<64, true>(
              bins, count - above, floor_left, target_left, [&](int bin, std::uint32_t x) {
                return x * key_mass((prefix << 6) + static_cast<std::uint32_t>(bin));
              });
          // Among equal keys: the fewest that satisfy the rule.
          const std::uint32_t in_bin = bins[max(b.bin, 0)];
          const std::uint32_t each =
              max(key_mass((prefix << 6) + static_cast<std::uint32_t>(b.bin)), 1U);
          const std::uint32_t lacking = target_left > b.mass_above ? target_left - b.mass_above : 0;
          ties = max(floor_left > b.above ? floor_left - b.above : 0U,
                     lacking / each + (lacking % each != 0 ? 1U : 0U));
          ties = min(min(ties, count - above - b.above), in_bin);
        }
      } else {
        const auto none = [](int, std::uint32_t) { return 0U; };
        b = !C::kPaper && level == 1 ? find_boundary<64, false>(bins, count - above, 0, 0, none)
                                     : find_boundary<kBins, false>(bins, count - above, 0, 0, none);
        ties = count - above - b.above;
      }
      if (step.lane() == 0) {
        s.found[0] = static_cast<std::uint32_t>(b.bin);
        s.found[1] = b.above;
        s.found[2] = b.mass_above;
        s.found[3] = ties;
      }
    }
    __syncthreads();
    const int bits = level == 0 ? 0 : Levels::shift(level - 1) - Levels::shift(level);
    prefix = (prefix << bits) + s.found[0];
    above += s.found[1];
    mass_above += s.found[2];
  }
  return prefix;
}

/// Centre product of a page from its codes, for one whose distance below its tile saturated.
template <class C>
__device__ __noinline__ float centre_product(const Step<C> step, int physical, int mean, int head) {
  const std::uint8_t* codes = step.record(kSummaries, physical) + mean * (C::kDim / 2);
  const std::int8_t* high = step.s.q_codes[2 * head];
  const std::int8_t* low = step.s.q_codes[2 * head + 1];
  int sum = 0;
  for (int d = 0; d < C::kDim; ++d) {
    const int code = codes[d / 8 * 4 + d % 4] >> (d % 8 >= 4 ? 4 : 0) & 15;
    sum += code * (128 * high[d] + low[d]);
  }
  const float scale =
      __half2float(reinterpret_cast<const __half*>(step.record(kParams, physical))[mean]);
  return scale * (step.s.q_step[head] * static_cast<float>(sum) - 7.5F * step.s.q_sum[head]);
}

/// Fills the candidate lists.
template <class C>
__device__ void select_candidates(const Step<C>& step) {
  using Levels = SelectLevels<C>;
  Fixed<C>& s = step.s;
  const StepArgs& args = step.args;
  const int sealed = step.sealed();
  const PagePool pool = page_pool(step);
  const int size = pool.last - pool.first;
  const int forced = sealed - size + step.open();

  const double wanted = args.fraction * static_cast<double>(step.n());
  auto tokens = static_cast<long long>(wanted);
  if (static_cast<double>(tokens) < wanted) ++tokens;
  tokens = min(max(tokens, static_cast<long long>(args.min_candidates)),
               static_cast<long long>(args.max_candidates));
  const auto budget = static_cast<int>(min((tokens + kPage - 1) / kPage, 1LL << 30));
  const int want = min(max(budget - forced, 0), size);
  const int floor = min(max((args.mass_floor + kPage - 1) / kPage - forced, 0), want);

  // Taken: keys above the threshold, and `limit` of the equal ones.
  std::uint32_t threshold = 0xffffffffU;
  std::uint32_t limit = 0;
  constexpr int kShift = Levels::shift(Levels::kLevels - 1);
  const bool all = want == size && args.mass <= 0;
  if (!all && want > 0) {
    threshold = find_page_threshold(step, pool, want, floor);
    limit = s.found[3];
  }

  // Each warp compacts a run of the pool.
  const int run = (size + 32 * C::kWarps - 1) / (32 * C::kWarps) * 32;
  const int begin = pool.first + step.warp() * run;
  const int end = min(begin + run, pool.last);
  const auto key_at = [&](int page) {
    return page < end ? std::uint32_t{step.keys()[page]} >> kShift : 0U;
  };
  std::uint32_t over = 0;
  std::uint32_t equal = 0;
#pragma unroll 1
  for (int at = begin; at < end; at += 32) {
    const int page = at + step.lane();
    const std::uint32_t key = key_at(page);
    over += __popc(__ballot_sync(kFullMask, page < end && (all || key > threshold)));
    equal += __popc(__ballot_sync(kFullMask, page < end && !all && key == threshold));
  }
  if (step.lane() == 0) s.warp_counts[step.warp()] = over | equal << 16;
  __syncthreads();
  const std::uint32_t counts = step.lane() < C::kWarps ? s.warp_counts[step.lane()] : 0;
  const std::uint32_t all_counts = __reduce_add_sync(kFullMask, counts);
  const std::uint32_t before =
      __reduce_add_sync(kFullMask, step.lane() < step.warp() ? counts : 0U);
  const auto taken_of = [&](std::uint32_t pair) {
    return (pair & 0xffffU) + min(pair >> 16, limit);
  };
  const int taken_all = static_cast<int>(taken_of(all_counts));
  if (step.tid() == 0) s.problem.sealed_candidates = sealed - size + taken_all;

  int position = pool.first + static_cast<int>(taken_of(before));
  std::uint32_t rank_equal = before >> 16;
#pragma unroll 1
  for (int at = begin; at < end; at += 32) {
    const int page = at + step.lane();
    const std::uint32_t key = key_at(page);
    const unsigned ties_here = __ballot_sync(kFullMask, page < end && !all && key == threshold);
    const unsigned lower = (1U << step.lane()) - 1U;
    const bool tie =
        (ties_here >> step.lane() & 1U) != 0 && rank_equal + __popc(ties_here & lower) < limit;
    const bool taken = page < end && (all || key > threshold || tie);
    const unsigned takers = __ballot_sync(kFullMask, taken);
    if (taken) step.candidate_pages()[position + __popc(takers & lower)] = page;
    position += __popc(takers);
    rank_equal += __popc(ties_here);
  }
#pragma unroll 1
  for (int i = step.tid(); i < pool.first; i += C::kThreads) step.candidate_pages()[i] = i;
  const int behind = pool.first + taken_all;
#pragma unroll 1
  for (int i = step.tid(); i < sealed + step.open() - pool.last; i += C::kThreads) {
    step.candidate_pages()[behind + i] = pool.last + i;
  }
  __syncthreads();

  // What estimates need of this block's candidates.
  const int first = step.begin();
#pragma unroll 1
  for (int i = step.tid(); i < step.owned(); i += C::kThreads) {
    const int page = step.candidate_pages()[first + i];
    const int physical = step.table()[page];
    step.physical()[i] = physical;
    if (args.pages != nullptr)
      args.pages[step.problem() * args.candidate_stride + first + i] = page;
    if constexpr (!C::kPaper && !C::kCentresAgain) {
      if (page >= sealed) continue;
      const int tile = page / kPage;
      const int owner = tile % C::kCluster;
      const int slot = tile / C::kCluster;
      bool saturated = false;
#pragma unroll
      for (int h = 0; h < C::kHeads; ++h) {
        const float* base = &step.tile_centre()[slot * C::kHeads + h];
        const std::uint32_t* word = &step.scores()[(kPage * slot + page % kPage) * C::kHeads + h];
        const float top = __uint_as_float(
            get_u32<C::kCluster>(reinterpret_cast<const std::uint32_t*>(base), owner));
        const std::uint32_t steps = get_u32<C::kCluster>(word, owner) >> 16;
        saturated = saturated || steps == 65535U;
        float* values = step.page_values() + i * C::kMeans * C::kHeads + h;
        values[0] = top - static_cast<float>(steps) * (1.0F / kLogSteps) - step.s.norm[h];
        if constexpr (C::kMeans == 2) {
          const int at = (kPage * slot + page % kPage) * C::kHeads + h;
          const auto* pair = reinterpret_cast<const std::uint32_t*>(step.second_centres()) + at / 2;
          const std::uint32_t other =
              get_u32<C::kCluster>(pair, owner) >> (16 * (at % 2)) & 0xffffU;
          saturated = saturated || other == 65535U;
          values[C::kHeads] = top - static_cast<float>(other) * (1.0F / kLogSteps) - step.s.norm[h];
        }
      }
      if (!saturated) continue;
#pragma unroll 1
      for (int k = 0; k < C::kMeans * C::kHeads; ++k) {
        const int h = k % C::kHeads;
        step.page_values()[i * C::kMeans * C::kHeads + k] =
            centre_product(step, physical, k / C::kHeads, h) - step.s.norm[h];
      }
    }
  }
  if (args.page_counts != nullptr && step.rank() == 0 && step.tid() == 0) {
    args.page_counts[step.problem()] = step.candidates();
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_SELECT_CUH_
