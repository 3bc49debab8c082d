// Attention products of a bf16 cache with the bf16 dot product instruction, which multiplies pairs
// and adds them to an f32: half the multiply steps of f32 products. Only where the instruction set
// has it.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_BF16_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_BF16_INL_H_

#include "backend/cpu/kernels/attend_math-inl.h"

#if TWILIGHT_HAS_BF16_DOT
TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// The query is split into two bf16 numbers, high + low, which together hold it to a relative
// 2^-16; both multiply the key, so keys cost two instructions for 32 channels and head. Weights are
// rounded to bf16 and the normaliser sums the rounded ones. An infinite key gives NaN. The layout
// of scores and weights is that of F32Products.
struct Bf16Products {
  using Weight = std::uint16_t;

  // [chunk of 32 channels][H][high 32, low 32], zeros past dim.
  template <int H>
  static void prepare_query(const float* q, std::int64_t dim, float factor, float* prepared) {
    auto* to = reinterpret_cast<std::uint16_t*>(prepared);
    for (std::int64_t d = 0; d < dim; d += 32) {
      for (int h = 0; h < H; ++h) {
        for (int half = 0; half < 2; ++half) {
          const bool inside = d + half * 16 < dim;
          __m512 x = inside ? _mm512_loadu_ps(q + h * dim + d + half * 16) : _mm512_setzero_ps();
          x = _mm512_mul_ps(x, _mm512_set1_ps(factor));
          const __m256i high = (__m256i)_mm512_cvtneps_pbh(x);
          const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x, widen(high)));
          std::uint16_t* at = to + (d / 32 * H + h) * 64 + half * 16;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), high);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 32), low);
        }
      }
    }
  }

  template <int H>
  static void scores(const std::byte* const* rows, const std::byte* const* next, int count,
                     const float* q, std::int64_t dim, float* s) {
    constexpr int kTokens = 16 / H;
    const auto* prepared = reinterpret_cast<const std::uint16_t*>(q);
    for (int t0 = 0; t0 < count; t0 += kTokens) {
      __m512 acc[16];  // [block = (quad, head)][4 tokens]
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
      std::int64_t d = 0;
      for (; d + 32 <= dim; d += 32) {
        // A line a row and chunk: in one burst a tile takes a twentieth longer.
        if (next != nullptr) prefetch_rows<kTokens>(next + t0, d * 2, d * 2 + 64);
        add_products<H, 32>(rows + t0, prepared + d * 2 * H, d, acc);
      }
      if (d < dim) {
        if (next != nullptr) prefetch_rows<kTokens>(next + t0, d * 2, d * 2 + 32);
        add_products<H, 16>(rows + t0, prepared + d * 2 * H, d, acc);
      }
      VF sums[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sums[i] = VF{acc[i]};
      _mm512_storeu_ps(s + t0 * H, sum_each(sums).raw);
    }
  }

  static HWY_INLINE VF store_weight(VF w, std::uint16_t* to) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(w.raw);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    return VF{widen(rounded)};
  }

  // o is [H][dim_stride], each 32 channels in the order of `store_output`.
  template <int H>
  static void accumulate(const std::byte* const* rows, const std::byte* const* next, int count,
                         const std::uint16_t* w, const float* decay, std::int64_t dim,
                         std::int64_t dim_stride, float* o) {
    constexpr int kChunks = H == 4 ? 2 : 4;
    std::int64_t d = 0;
    for (; d + kChunks * 32 <= dim; d += kChunks * 32) {
      accumulate_at<H, kChunks, 32>(rows, next, count, w, decay, d, dim_stride, o);
    }
    for (; d + 32 <= dim; d += 32) {
      accumulate_at<H, 1, 32>(rows, next, count, w, decay, d, dim_stride, o);
    }
    if (d < dim) accumulate_at<H, 1, 16>(rows, next, count, w, decay, d, dim_stride, o);
  }

  // Interleaving two rows leaves the channels of 32 as (0-3, 8-11, 16-19, 24-27) and (4-7, ...).
  static void store_output(const float* o, std::int64_t dim, float* out) {
    for (std::int64_t d = 0; d < dim; d += 4) {
      const std::int64_t from = d / 32 * 32 + d % 8 / 4 * 16 + d % 32 / 8 * 4;
      _mm_storeu_ps(out + d, _mm_loadu_ps(o + from));
    }
  }

 private:
  static HWY_INLINE __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }

  // The 32 channels of a row from d on, or the last 16 of it and zeros.
  template <int kChannels>
  static HWY_INLINE __m512i load(const std::byte* row, std::int64_t d) {
    const auto* from = reinterpret_cast<const std::uint16_t*>(row) + d;
    if constexpr (kChannels == 32) return _mm512_loadu_si512(from);
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  template <int H, int kChannels>
  static HWY_INLINE void add_products(const std::byte* const* rows, const std::uint16_t* q,
                                      std::int64_t d, __m512* acc) {
    __m512bh high[H];
    __m512bh low[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      high[h] = (__m512bh)_mm512_loadu_si512(q + h * 64);
      low[h] = (__m512bh)_mm512_loadu_si512(q + h * 64 + 32);
    }
#pragma GCC unroll 16
    for (int t = 0; t < 16 / H; ++t) {
      const __m512bh k = (__m512bh)load<kChannels>(rows[t], d);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        __m512& sum = acc[(t / 4 * H + h) * 4 + t % 4];
        sum = _mm512_dpbf16_ps(sum, k, low[h]);
        sum = _mm512_dpbf16_ps(sum, k, high[h]);
      }
    }
  }

  template <int H, int kChunks, int kChannels>
  static HWY_INLINE void accumulate_at(const std::byte* const* rows, const std::byte* const* next,
                                       int count, const std::uint16_t* w, const float* decay,
                                       std::int64_t d, std::int64_t dim_stride, float* o) {
    __m512 acc[H * kChunks * 2];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
      for (int c = 0; c < kChunks * 2; ++c) {
        acc[h * kChunks * 2 + c] = _mm512_mul_ps(_mm512_loadu_ps(o + h * dim_stride + d + c * 16),
                                                 _mm512_set1_ps(decay[h * 4]));
      }
    }
    for (int t = 0; t < count; t += 2) {
      if (next != nullptr) prefetch_rows<2>(next + t, d * 2, (d + kChunks * kChannels) * 2);
      __m512bh pair[H];  // weights of tokens t and t + 1
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        std::int32_t both;
        std::memcpy(&both, w + (t / 4 * H + h) * 4 + t % 4, sizeof(both));
        pair[h] = (__m512bh)_mm512_set1_epi32(both);
      }
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) {
        const __m512i v0 = load<kChannels>(rows[t], d + c * 32);
        const __m512i v1 = load<kChannels>(rows[t + 1], d + c * 32);
        const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(v0, v1);
        const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(v0, v1);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          __m512* sum = acc + (h * kChunks + c) * 2;
          sum[0] = _mm512_dpbf16_ps(sum[0], first, pair[h]);
          sum[1] = _mm512_dpbf16_ps(sum[1], second, pair[h]);
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
      for (int c = 0; c < kChunks * 2; ++c) {
        _mm512_storeu_ps(o + h * dim_stride + d + c * 16, acc[h * kChunks * 2 + c]);
      }
    }
  }
};

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
#endif

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_BF16_INL_H_
