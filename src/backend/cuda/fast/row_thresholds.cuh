#ifndef TWILIGHT_BACKEND_CUDA_FAST_ROW_THRESHOLDS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_ROW_THRESHOLDS_CUH_

#include "backend/cuda/fast/select.cuh"
#include "backend/cuda/fast/token_weights.cuh"

/// Thresholds of the rows that top_p.cuh cannot finish with its one list: top-p sets smaller than
/// the least number of tokens, and boundary bins of too many weights.
namespace twilight::cuda_fast {

/// Bins of a mass histogram, from `top` down to `bottom`, that hold a row's `want`-th largest
/// weight for certain; none where bottom is negative.
struct CountWindow {
  int top = -1;
  int bottom = -1;
};

/// How many weights a bin holds follows from its mass within the bin's width, 1 / 32, and the
/// rounding of masses, 1 / 64 from bin 192 (weights of 64) on. One warp.
__device__ __forceinline__ CountWindow find_count_window(const std::uint32_t* bins,
                                                         std::uint32_t want) {
  constexpr float kMost = 65.0F / 64.0F;
  constexpr float kLeast = 32.0F / 33.0F * 63.0F / 64.0F;
  constexpr int kPer = kBins / 32;
  constexpr int kFirstBin = 192;
  const auto most_of = [&](int bin) {
    return __fdividef(static_cast<float>(bins[bin]), __uint_as_float(bin_edge(bin)));
  };
  const auto prefix = [](float x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(kFullMask, x, step);
      if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
    }
    return x;
  };
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int begin = kBins - (lane + 1) * kPer;
  float sum = 0;
#pragma unroll 4
  for (int i = 0; i < kPer; ++i) sum += most_of(begin + ((i + lane) & (kPer - 1)));
  const float upto = prefix(sum);
  const auto reaching = [&](float wanted) {
    const unsigned hits = __ballot_sync(kFullMask, upto >= wanted);
    if (hits == 0) return -1;
    const int owner = __ffs(static_cast<int>(hits)) - 1;
    const int highest = kBins - 1 - owner * kPer;
    const float above = __shfl_sync(kFullMask, upto - sum, owner);
    const unsigned inner =
        __ballot_sync(kFullMask, above + prefix(most_of(highest - lane)) >= wanted);
    // Sums of another order may fall short by a rounding.
    return highest - (inner == 0 ? kPer - 1 : __ffs(static_cast<int>(inner)) - 1);
  };
  CountWindow out;
  out.bottom = reaching(static_cast<float>(want) / kLeast);
  out.top = reaching(static_cast<float>(want) / kMost);
  if (out.bottom < kFirstBin) out.bottom = -1;
  return out;
}

/// The `want`-th largest weight of a row as bits, from its mass histogram and one more pass over
/// the weights; 0 where the histogram does not tell, or too many weights are near it.
template <class C>
__device__ __noinline__ std::uint32_t near_count_threshold(const Step<C> step,
                                                           const Factors<C> factor, int row,
                                                           std::uint32_t want) {
  constexpr std::uint32_t kSegment = kBoundaryList / C::kCluster;
  Fixed<C>& s = step.s;
  std::uint32_t* const list = step.boundary() + row * kBoundaryList;
  __syncthreads();  // the counts that led here have been read
  if (step.warp() == 0) {
    const CountWindow window = find_count_window(step.histogram() + row * kBins, want);
    if (step.lane() == 0) {
      s.found[0] = static_cast<std::uint32_t>(window.top);
      s.found[1] = static_cast<std::uint32_t>(window.bottom);
    }
  }
#pragma unroll 1
  for (int i = step.tid(); i < kBoundaryList; i += C::kThreads) list[i] = 0;
  if (step.tid() == 0) {
    s.list_count[row] = s.above_count[row] = 0;
    s.threshold[row] = 0xffffffffU;
  }
  cluster_sync<C::kCluster>();
  if (static_cast<int>(s.found[1]) < 0) {  // in every block: they have the same histogram
    // Weights below those that pruning counts: all of them by their bins.
    std::uint32_t* const bins = step.histogram() + row * kBins;
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) bins[i] = 0;
    cluster_sync<C::kCluster>();
    for_tokens(step, [&](const float(&w)[C::kHeads]) {
      const int bin = mass_bin(mixed_weight<C>(w, factor));
      for (int r = 0; r < C::kCluster; ++r) add_u32<C::kCluster>(&bins[bin], r, 1U);
    });
    cluster_sync<C::kCluster>();
    if (step.warp() == 0) {
      const Boundary b =
          find_boundary<kBins, false>(bins, want, 0, 0, [](int, std::uint32_t) { return 0U; });
      if (step.lane() == 0) s.found[0] = s.found[1] = static_cast<std::uint32_t>(b.bin);
    }
    __syncthreads();
    if (static_cast<int>(s.found[1]) <= 0) return 0;  // less than a unit: bins are cut off there
  }
  const int bottom = static_cast<int>(s.found[1]);
  const std::uint32_t lower = bin_edge(bottom);
  const std::uint32_t upper = bin_edge(static_cast<int>(s.found[0]) + 1);
  std::uint32_t higher = 0;
  for_tokens(step, [&](const float(&w)[C::kHeads]) {
    const std::uint32_t bits = __float_as_uint(mixed_weight<C>(w, factor));
    if (bits < lower) return;
    if (bits >= upper) {
      ++higher;
      return;
    }
    const std::uint32_t at = atomicAdd(&s.list_count[row], 1U);
    if (at >= kSegment) return;
    for (int to = 0; to < C::kCluster; ++to) {
      put_u32<C::kCluster>(&list[static_cast<std::uint32_t>(step.rank()) * kSegment + at], to,
                           bits);
    }
  });
  higher = __reduce_add_sync(kFullMask, higher);
  if (step.lane() < C::kCluster) add_u32<C::kCluster>(&s.above_count[row], step.lane(), higher);
  __syncthreads();
  if (step.tid() < C::kCluster) {
    put_u32<C::kCluster>(&s.segments[step.rank()][row], step.tid(), s.list_count[row]);
  }
  cluster_sync<C::kCluster>();
  bool fits = true;
  for (int r = 0; r < C::kCluster; ++r) fits = fits && s.segments[r][row] <= kSegment;
  if (fits && step.tid() < kBoundaryList && list[step.tid()] != 0) {
    const std::uint32_t mine = list[step.tid()];
    std::uint32_t above = s.above_count[row];
#pragma unroll 1
    for (int r = 0; r < C::kCluster; ++r) {
#pragma unroll 4
      for (std::uint32_t i = 0; i < s.segments[r][row]; ++i) {
        above += list[static_cast<std::uint32_t>(r) * kSegment + i] > mine ? 1U : 0U;
      }
    }
    if (above < want) atomicMin(&s.threshold[row], mine);
  }
  __syncthreads();
  const std::uint32_t found = s.threshold[row];
  return fits && found != 0xffffffffU ? found : 0;
}

/// The k-th largest weight as bits (the last one dropped), by counts. Only for rows whose top-p set
/// is smaller than the least number of tokens where near_count_threshold gives up.
template <class C>
__device__ __noinline__ std::uint32_t count_threshold(const Step<C> step, const Factors<C> factor,
                                                      std::uint32_t want) {
  std::uint32_t prefix = 0;
  std::uint32_t above = 0;
#pragma unroll 1
  for (int level = 0; level < 3; ++level) {
    const int shift = 21 - 10 * level;
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) step.histogram()[i] = 0;
    cluster_sync<C::kCluster>();
    for_tokens(step, [&](const float(&w)[C::kHeads]) {
      const float u = mixed_weight<C>(w, factor);
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
__device__ __noinline__ std::uint32_t refine_threshold(const Step<C> step, const Factors<C> factor,
                                                       int bin, std::uint32_t above,
                                                       std::uint32_t target) {
  std::uint32_t prefix = bin_edge(bin) >> kBinShift;
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    const int shift = 9 - 9 * level;
#pragma unroll 1
    for (int i = step.tid(); i < kBins; i += C::kThreads) step.histogram()[i] = 0;
    cluster_sync<C::kCluster>();
    for_tokens(step, [&](const float(&w)[C::kHeads]) {
      const float u = mixed_weight<C>(w, factor);
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

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_ROW_THRESHOLDS_CUH_
