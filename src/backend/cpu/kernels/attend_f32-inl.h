// Attention products in f32 for every element type and instruction set: keys and values become
// floats exactly, products and sums are f32 fused multiply-adds.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_F32_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_F32_INL_H_

#include "backend/cpu/kernels/attend_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// One block of tokens: `scores` and weights are laid out [quad of tokens][H][4], so that a vector
// of 128-bit (head, quad) blocks comes out of the dot products, goes through the softmax and into
// the weighted sum without a change of layout. H is 1, 2 or 4.
template <typename Elem>
struct F32Products {
  using Weight = float;

  // Query of H heads, times `factor`: [H][dim].
  template <int H>
  static void prepare_query(const float* q, std::int64_t dim, float factor, float* prepared) {
    for (std::int64_t i = 0; i < H * dim; ++i) prepared[i] = q[i] * factor;
  }

  // `count` tokens, a multiple of 16. Rows of `next` are prefetched unless null.
  template <int H>
  static void scores(const std::byte* const* rows, const std::byte* const* next, int count,
                     const float* q, std::int64_t dim, float* s) {
    constexpr int kHeads = H < kBlocksPerVec ? H : kBlocksPerVec;
    constexpr int kTokens = kLanes / kHeads;
    const DF df;
    for (int t0 = 0; t0 < count; t0 += kTokens) {
      if (next != nullptr) prefetch_rows<kTokens>(next + t0, 0, dim * Elem::kBytes);
      for (int h0 = 0; h0 < H; h0 += kHeads) {
        VF acc[kLanes];  // [block = (quad, head)][4 tokens]
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) acc[i] = hn::Zero(df);
        for (std::int64_t d = 0; d < dim; d += kLanes) {
          VF qv[kHeads];
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) qv[h] = hn::LoadU(df, q + (h0 + h) * dim + d);
#pragma GCC unroll 16
          for (int t = 0; t < kTokens; ++t) {
            const VF k = Elem::load(rows[t0 + t], d);
#pragma GCC unroll 4
            for (int h = 0; h < kHeads; ++h) {
              VF& sum = acc[(t / 4 * kHeads + h) * 4 + t % 4];
              sum = hn::MulAdd(k, qv[h], sum);
            }
          }
        }
        hn::StoreU(sum_each(acc), df, s + (t0 / 4 * H + h0) * 4);
      }
    }
  }

  // The weight as the weighted sum will use it.
  static HWY_INLINE VF store_weight(VF w, float* to) {
    hn::StoreU(w, DF(), to);
    return w;
  }

  // o[h] = o[h] * decay[4 h] + sum over tokens of w V; o is [H][dim_stride].
  template <int H>
  static void accumulate(const std::byte* const* rows, const std::byte* const* next, int count,
                         const float* w, const float* decay, std::int64_t dim,
                         std::int64_t dim_stride, float* o) {
    constexpr int kChunks = (kLanes == 16 ? 16 : 8) / H;
    std::int64_t d = 0;
    for (; d + kChunks * kLanes <= dim; d += kChunks * kLanes) {
      accumulate_at<H, kChunks>(rows, next, count, w, decay, d, dim_stride, o);
    }
    for (; d < dim; d += kLanes) {
      accumulate_at<H, 1>(rows, next, count, w, decay, d, dim_stride, o);
    }
  }

  // Sums of one head, in order of the channels.
  static void store_output(const float* o, std::int64_t dim, float* out) {
    std::memcpy(out, o, static_cast<std::size_t>(dim) * sizeof(float));
  }

 private:
  template <int H, int kChunks>
  static HWY_INLINE void accumulate_at(const std::byte* const* rows, const std::byte* const* next,
                                       int count, const float* w, const float* decay,
                                       std::int64_t d, std::int64_t dim_stride, float* o) {
    const DF df;
    VF acc[H * kChunks];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) {
        acc[h * kChunks + c] =
            hn::Mul(hn::LoadU(df, o + h * dim_stride + d + c * kLanes), hn::Set(df, decay[h * 4]));
      }
    }
    for (int t = 0; t < count; ++t) {
      if (next != nullptr) {
        prefetch_rows<1>(next + t, d * Elem::kBytes, (d + kChunks * kLanes) * Elem::kBytes);
      }
      VF wv[H];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) wv[h] = hn::Set(df, w[(t / 4 * H + h) * 4 + t % 4]);
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) {
        const VF v = Elem::load(rows[t], d + c * kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          acc[h * kChunks + c] = hn::MulAdd(v, wv[h], acc[h * kChunks + c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) {
        hn::StoreU(acc[h * kChunks + c], df, o + h * dim_stride + d + c * kLanes);
      }
    }
  }
};

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_F32_INL_H_
