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
#pragma unroll 8
  for (int i = 0; i < kPer; ++i) {
    const int bin = begin + ((i + lane) & (kPer - 1));
    const std::uint32_t x = bins[bin];
    sum += x;
    if constexpr (kMass) mass += mass_of(bin, x);
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
  __device__ static constexpr int mask(int level) { return !C::kPaper && level == 1 ? 63 : 1023; }
};

/// Share of a page with this key, 2^31 for 1.
__device__ __forceinline__ std::uint32_t key_mass(std::uint32_t key) {
  return __float2uint_rn(exp2_fast((static_cast<float>(key) - 65535.0F) * (1.0F / kLogSteps) +
                                   31.0F));
}

/// Pages of [first, last) above `threshold` and the first `ties` equal to it, found by one warp
/// and left in `found`.
template <class C>
__device__ void find_page_threshold(const Step<C>& step, int first, int last, int want, int floor) {
  using Levels = SelectLevels<C>;
  Fixed<C>& s = step.s;
  std::uint32_t* bins = step.select_histogram();
  const bool by_mass = !C::kPaper && step.args.mass > 0;
  std::uint32_t prefix = 0;
  std::uint32_t above = 0;
  std::uint32_t mass_above = 0;
#pragma unroll
  for (int level = 0; level < Levels::kLevels; ++level) {
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) {
      bins[i] = 0;
      if (by_mass && level == 0) step.select_mass()[i] = 0;
    }
    if (level == 0 && step.tid() == 0) s.select_total = s.select_forced = 0;
    __syncthreads();
#pragma unroll 1
    for (int page = first + step.tid(); page < last; page += C::kThreads) {
      const std::uint32_t key = step.keys()[page];
      const bool match = level == 0 || (key >> Levels::shift(level > 0 ? level - 1 : 0)) == prefix;
      if (!match) continue;
      const std::uint32_t bin = (key >> Levels::shift(level)) & Levels::mask(level);
      atomicAdd(&bins[bin], 1U);
      if (by_mass && level == 0) atomicAdd(&step.select_mass()[bin], key_mass(key));
    }
    if (by_mass && level == 0) {
#pragma unroll 1
      for (int page = step.tid(); page < step.sealed(); page += C::kThreads) {
        const std::uint32_t mass = key_mass(step.keys()[page]);
        atomicAdd(&s.select_total, mass);
        if (page < first || page >= last) atomicAdd(&s.select_forced, mass);
      }
    }
    __syncthreads();
    if (step.warp() == 0) {
      Boundary b;
      const auto count = static_cast<std::uint32_t>(want);
      if (by_mass) {
        const double wanted = static_cast<double>(step.args.mass) * s.select_total;
        const double missing = wanted - s.select_forced;
        const auto target = static_cast<std::uint32_t>(missing > 0 ? ceil(missing) : 0.0);
        const std::uint32_t target_left = target > mass_above ? target - mass_above : 0;
        const auto floor_left = static_cast<std::uint32_t>(max(floor - static_cast<int>(above), 0));
        if (level == 0) {
          b = find_boundary<kBins, true>(bins, count - above, floor_left, target_left,
                                         [&](int bin, std::uint32_t) {
                                           return step.select_mass()[bin];
                                         });
        } else {
          b = find_boundary<64, true>(
              bins, count - above, floor_left, target_left, [&](int bin, std::uint32_t x) {
                return x * key_mass((prefix << 6) + static_cast<std::uint32_t>(bin));
              });
        }
        if (level == Levels::kLevels - 1) {
          // Among equal keys: the fewest that satisfy the rule.
          const std::uint32_t in_bin = bins[max(b.bin, 0)];
          const std::uint32_t each =
              max(key_mass((prefix << 6) + static_cast<std::uint32_t>(b.bin)), 1U);
          const std::uint32_t lacking =
              target_left > b.mass_above ? target_left - b.mass_above : 0;
          std::uint32_t ties = max(floor_left > b.above ? floor_left - b.above : 0U,
                                   lacking / each + (lacking % each != 0 ? 1U : 0U));
          ties = min(min(ties, count - above - b.above), in_bin);
          if (step.lane() == 0) s.found[3] = ties;
        }
      } else {
        b = find_boundary<kBins, false>(bins, count - above, 0, 0,
                                        [](int, std::uint32_t) { return 0U; });
        if (level == Levels::kLevels - 1 && step.lane() == 0) s.found[3] = count - above - b.above;
      }
      if (step.lane() == 0) {
        s.found[0] = static_cast<std::uint32_t>(b.bin);
        s.found[1] = b.above;
        s.found[2] = b.mass_above;
      }
    }
    __syncthreads();
    prefix = (level == 0 ? 0U : prefix << (Levels::shift(level > 0 ? level - 1 : 0) -
                                           Levels::shift(level))) +
             s.found[0];
    above += s.found[1];
    mass_above += s.found[2];
    if (level + 1 < Levels::kLevels) __syncthreads();
  }
  if (step.tid() == 0) s.found[0] = prefix;
  __syncthreads();
}

/// Centre product of a page from its codes, for one whose distance below its tile saturated.
template <class C>
__device__ __noinline__ float centre_product(const Step<C> step, int physical, int head) {
  const std::uint8_t* codes = step.record(step.args.summaries, physical);
  const std::int8_t* high = step.s.q_codes[2 * head];
  const std::int8_t* low = step.s.q_codes[2 * head + 1];
  int sum = 0;
  for (int d = 0; d < C::kDim; ++d) {
    const int code = codes[d / 8 * 4 + d % 4] >> (d % 8 >= 4 ? 4 : 0) & 15;
    sum += code * (128 * high[d] + low[d]);
  }
  const float scale = __half2float(
      *reinterpret_cast<const __half*>(step.record(step.args.params, physical)));
  return scale * (step.s.q_step[head] * static_cast<float>(sum) - 7.5F * step.s.q_sum[head]);
}

/// Fills the candidate lists; `step` learns its share.
template <class C>
__device__ void select_candidates(const Step<C>& step) {
  using Levels = SelectLevels<C>;
  Fixed<C>& s = step.s;
  const StepArgs& args = step.args;
  const int sealed = step.sealed();
  const bool has_open = step.n() % kPage != 0;
  const int first = min((args.sink_tokens + kPage - 1) / kPage, sealed);
  const int last = max(first, sealed - min(args.recent_pages, sealed));
  const int pool = last - first;
  const int forced = sealed - pool + (has_open ? 1 : 0);

  const double wanted = args.fraction * static_cast<double>(step.n());
  auto tokens = static_cast<long long>(wanted);
  if (static_cast<double>(tokens) < wanted) ++tokens;
  tokens = min(max(tokens, static_cast<long long>(args.min_candidates)),
               static_cast<long long>(args.max_candidates));
  const auto budget = static_cast<int>(min((tokens + kPage - 1) / kPage, 1LL << 30));
  const int want = min(max(budget - forced, 0), pool);
  const int floor = min(max((args.mass_floor + kPage - 1) / kPage - forced, 0), want);

  // Taken: keys above the threshold, and `ties` of the equal ones.
  std::uint32_t threshold = 0;
  int ties = 0;
  constexpr int kShift = Levels::shift(Levels::kLevels - 1);
  bool all = want == pool && args.mass <= 0;
  if (!all && want > 0) {
    find_page_threshold(step, first, last, want, floor);
    threshold = s.found[0];
    ties = static_cast<int>(s.found[3]);
  } else if (!all) {
    threshold = 0xffffffffU;
  }

  // Each warp compacts a run of the pool.
  const int run = (pool + 32 * C::kWarps - 1) / (32 * C::kWarps) * 32;
  const int begin = first + step.warp() * run;
  const int end = min(begin + run, last);
  std::uint32_t over = 0;
  std::uint32_t equal = 0;
#pragma unroll 1
  for (int at = begin; at < end; at += 32) {
    const int page = at + step.lane();
    const std::uint32_t key = page < end ? std::uint32_t{step.keys()[page]} >> kShift : 0;
    over += __popc(__ballot_sync(kFullMask, page < end && (all || key > threshold)));
    equal += __popc(__ballot_sync(kFullMask, page < end && !all && key == threshold));
  }
  if (step.lane() == 0) {
    s.warp_counts[0][step.warp()] = over;
    s.warp_counts[1][step.warp()] = equal;
  }
  __syncthreads();
  std::uint32_t over_before = step.lane() < step.warp() ? s.warp_counts[0][step.lane()] : 0;
  std::uint32_t equal_before = step.lane() < step.warp() ? s.warp_counts[1][step.lane()] : 0;
  std::uint32_t over_all = step.lane() < C::kWarps ? s.warp_counts[0][step.lane()] : 0;
  std::uint32_t equal_all = step.lane() < C::kWarps ? s.warp_counts[1][step.lane()] : 0;
  over_before = __reduce_add_sync(kFullMask, over_before);
  equal_before = __reduce_add_sync(kFullMask, equal_before);
  over_all = __reduce_add_sync(kFullMask, over_all);
  equal_all = __reduce_add_sync(kFullMask, equal_all);
  const auto limit = static_cast<std::uint32_t>(ties);
  const int taken_all = static_cast<int>(over_all + min(equal_all, limit));
  if (step.tid() == 0) s.problem.sealed_candidates = sealed - pool + taken_all;
  __syncthreads();

  const bool lists = args.pages != nullptr && step.rank() == 0;
  const auto take = [&](int i, int page) {
    step.candidate_pages()[i] = page;
    if (lists) args.pages[step.problem() * args.candidate_stride + i] = page;
    const int mine = i - step.begin();
    if (mine < 0 || mine >= step.owned()) return;
    step.physical()[mine] = step.table()[page];
    if constexpr (!C::kPaper) {
      if (page >= sealed) return;
      const int tile = page / kPage;
      const int owner = tile % C::kCluster;
      const int slot = tile / C::kCluster;
#pragma unroll
      for (int h = 0; h < C::kHeads; ++h) {
        const float* base = &step.tile_centre()[slot * C::kHeads + h];
        const std::uint32_t* word =
            &step.scores()[(kPage * slot + page % kPage) * C::kHeads + h];
        const float top =
            __uint_as_float(get_u32<C::kCluster>(reinterpret_cast<const std::uint32_t*>(base), owner));
        const std::uint32_t steps = get_u32<C::kCluster>(word, owner) >> 16;
        step.page_values()[mine * C::kHeads + h] =
            steps == 65535U ? centre_product(step, step.table()[page], h)
                            : top - static_cast<float>(steps) * (1.0F / kLogSteps);
      }
    }
  };
  auto position = first + static_cast<int>(over_before + min(equal_before, limit));
  std::uint32_t rank_equal = equal_before;
#pragma unroll 1
  for (int at = begin; at < end; at += 32) {
    const int page = at + step.lane();
    const std::uint32_t key = page < end ? std::uint32_t{step.keys()[page]} >> kShift : 0;
    const unsigned ties_here =
        __ballot_sync(kFullMask, page < end && !all && key == threshold);
    const unsigned lower = (1U << step.lane()) - 1U;
    const bool tie = (ties_here >> step.lane() & 1U) != 0 &&
                     rank_equal + __popc(ties_here & lower) < limit;
    const bool taken = page < end && (all || key > threshold || tie);
    const unsigned takers = __ballot_sync(kFullMask, taken);
    if (taken) take(position + __popc(takers & lower), page);
    position += __popc(takers);
    rank_equal += __popc(ties_here);
  }
#pragma unroll 1
  for (int i = step.tid(); i < first; i += C::kThreads) take(i, i);
  const int tail = step.candidates() - (first + taken_all);
#pragma unroll 1
  for (int i = step.tid(); i < tail; i += C::kThreads) take(first + taken_all + i, last + i);
  if (lists && step.tid() == 0) args.page_counts[step.problem()] = step.candidates();
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_SELECT_CUH_
