#ifndef TWILIGHT_BACKEND_CUDA_FAST_TOKEN_WEIGHTS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_TOKEN_WEIGHTS_CUH_

#include "backend/cuda/fast/step_state.cuh"

/// Walks over the estimated weights of a block's tokens, and what a weight counts in the row that
/// is pruned: masses are integers of 2^30 for a row, so sums do not depend on order.
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

// Bins of a mass histogram are the leading 14 bits of a weight, 32 an octave, from 1 on.
inline constexpr int kBinShift = 18;
inline constexpr int kFirstBinBits = 127 << 5;

__device__ __forceinline__ int mass_bin(float u) {
  return min(max((static_cast<int>(__float_as_uint(u)) >> kBinShift) - kFirstBinBits, 0),
             kBins - 1);
}
/// Bits of the least weight in a bin above 0.
__device__ __forceinline__ std::uint32_t bin_edge(int bin) {
  return static_cast<std::uint32_t>(bin + kFirstBinBits) << kBinShift;
}

/// Rows that are pruned at once: each head, or their mean.
template <class C>
inline constexpr int kPruneRows = C::kPaper ? C::kHeads : 1;

template <class C>
__device__ __forceinline__ float row_weight(const float (&w)[C::kHeads], const Factors<C>& factor,
                                            int row) {
  if constexpr (C::kPaper) return w[row] * factor.of[row];
  return mixed_weight<C>(w, factor);
}

/// Calls f(g, weights of token g, of token g + 8) for half of page half / 2: g in 4 (half % 2) +
/// 0..3. The order of g is rotated by thread, which keeps lanes off each other's banks.
template <class C, class F>
__device__ __forceinline__ void for_half_page(const Step<C>& step, int half, const F& f) {
  constexpr int kAtOnce = C::kHeads >= 4 ? 1 : 4 / C::kHeads;
  constexpr int kWords = kAtOnce * C::kHeads;
  constexpr int kPasses = 4 / kAtOnce;
  const std::uint32_t* words = step.weights() + half * 4 * C::kHeads;
#pragma unroll 1
  for (int k = 0; k < kPasses; ++k) {
    const int pass = (k + half * C::kHeads / 8) % kPasses;
    std::uint32_t pair[kWords];
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(words + pass * kWords + i);
      pair[i] = v.x, pair[i + 1] = v.y, pair[i + 2] = v.z, pair[i + 3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      float low[C::kHeads];
      float high[C::kHeads];
#pragma unroll
      for (int h = 0; h < C::kHeads; ++h) {
        low[h] = __uint_as_float(pair[j * C::kHeads + h] << 16);
        high[h] = __uint_as_float(pair[j * C::kHeads + h] & 0xffff0000U);
      }
      f(4 * (half % 2) + pass * kAtOnce + j, low, high);
    }
  }
}

/// Calls f(weights of the heads) for this block's tokens; a thread takes two at a time, so that
/// the few pages of a cluster's block still occupy its threads.
template <class C, class F>
__device__ __forceinline__ void for_tokens(const Step<C>& step, const F& f) {
  using Words = std::conditional_t<C::kHeads == 1, std::uint32_t, uint4>;
  constexpr int kLoads = C::kHeads == 8 ? 2 : 1;
  const auto* words = reinterpret_cast<const Words*>(step.weights());
#pragma unroll 1
  for (int i = step.tid(); i < kPage / 2 * step.owned(); i += C::kThreads) {
    Words pairs[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) pairs[k] = words[i * kLoads + k];
    const auto* pair = reinterpret_cast<const std::uint32_t*>(pairs);
    float low[C::kHeads];
    float high[C::kHeads];
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) {
      low[h] = __uint_as_float(pair[h] << 16);
      high[h] = __uint_as_float(pair[h] & 0xffff0000U);
    }
    f(low);
    f(high);
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_TOKEN_WEIGHTS_CUH_
