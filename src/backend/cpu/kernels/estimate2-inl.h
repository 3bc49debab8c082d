// Products of rotated queries with 2-bit residuals, lane = token.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE2_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE2_INL_H_

#include "backend/cpu/kernels/estimate_query-inl.h"
#include "backend/cpu/kernels/rotate-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// A residual is s (code - 1.5), so with q the rotated query and x = max|q|:
//
// Table look-ups (VBMI): a nibble of a record is two channels (a, b), and for each such pair a
// table of 16 bytes holds round((q_a (code_a - 1.5) + q_b (code_b - 1.5)) / step), the largest
// entry 63. One vpermb looks up 64 of them, which is what two dot products of 64 bytes would do;
// two results add without overflow before vpdpbusd sums the bytes of a lane. Each pair is off by
// at most half a step, step <= 3 x / 63: |error| <= D x / 84 s.
//
// Byte products: q ~= step * qi, |qi| <= 127, |error| <= D x / 254 * 1.5 s.
//
// Other sets multiply the query itself.
struct Estimate2Head {
  float step = 0;    // unit scale * step
  float centre = 0;  // 1.5 sum qi; 0 where codes come centred
};

constexpr float kTableTop = 63.0F;

// 32-bit words of one head's query.
inline std::int64_t estimate2_words(int head_dim) {
  if (TWILIGHT_HAS_VBMI) return std::int64_t{2} * head_dim;
  return TWILIGHT_INTEGER_ESTIMATES ? head_dim / 4 : head_dim;
}

inline std::int64_t estimate2_constants_bytes(int group) {
  return static_cast<std::int64_t>(
      align_up(static_cast<std::size_t>(group) * sizeof(Estimate2Head)));
}

#if TWILIGHT_HAS_VBMI

// Tables of 64 bytes: group g of 16 channels, half j, then the heads of the block. Byte 16 b + n:
// nibble n of the pair of channels 16 g + 8 j + b and that + 4. `tables` is the head's first,
// `heads` the distance to its next.
inline Estimate2Head prepare_tables(const float* q, int head_dim, float scale, std::byte* tables,
                                    int heads) {
  float largest = 0;
  for (int d = 0; d < head_dim; d += 8) {
    for (int b = 0; b < 4; ++b) {
      largest = std::max(largest, 1.5F * (std::fabs(q[d + b]) + std::fabs(q[d + b + 4])));
    }
  }
  Estimate2Head head;
  const float step = largest / kTableTop;
  const float inverse = step > 0 ? 1.0F / step : 0.0F;
  head.step = scale * step;
  HWY_ALIGN static constexpr float kLow[16] = {-1.5F, -0.5F, 0.5F, 1.5F, -1.5F, -0.5F, 0.5F, 1.5F,
                                               -1.5F, -0.5F, 0.5F, 1.5F, -1.5F, -0.5F, 0.5F, 1.5F};
  HWY_ALIGN static constexpr float kHigh[16] = {-1.5F, -1.5F, -1.5F, -1.5F, -0.5F, -0.5F,
                                                -0.5F, -0.5F, 0.5F,  0.5F,  0.5F,  0.5F,
                                                1.5F,  1.5F,  1.5F,  1.5F};
  const __m512 low = _mm512_load_ps(kLow);
  const __m512 high = _mm512_load_ps(kHigh);
  for (int d = 0; d < head_dim; d += 8, tables += 64 * heads) {
    for (int b = 0; b < 4; ++b) {
      const __m512 sum =
          _mm512_fmadd_ps(_mm512_set1_ps(q[d + b] * inverse), low,
                          _mm512_mul_ps(_mm512_set1_ps(q[d + b + 4] * inverse), high));
      _mm_store_si128(reinterpret_cast<__m128i*>(tables + 16 * b),
                      _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(sum)));
    }
  }
  return head;
}

#else

inline Estimate2Head prepare_words(const float* q, int head_dim, float scale, std::uint32_t* words,
                                   int heads) {
  Estimate2Head head;
#if TWILIGHT_INTEGER_ESTIMATES
  std::int32_t rounded[kMaxIndexDim];
  float step;
  round_query(q, head_dim, 127, rounded, &step);
  head.step = scale * step;
  std::int32_t total = 0;
  for (int d = 0; d < head_dim; ++d) total += rounded[d];
  head.centre = 1.5F * static_cast<float>(total);
  for (int w = 0; w < head_dim / 4; ++w) words[w * heads] = pack_bytes(rounded + 4 * w);
#else
  head.step = scale;
  for (int d = 0; d < head_dim; ++d) std::memcpy(words + d * heads, q + d, sizeof(float));
#endif
  return head;
}

#endif

inline std::int64_t estimate2_query_bytes(int head_dim, int group) {
  return estimate2_constants_bytes(group) +
         static_cast<std::int64_t>(
             align_up(static_cast<std::size_t>(4 * group * estimate2_words(head_dim))));
}

// The constants of all heads, then the words or tables of one block of heads after another.
inline void prepare_estimates2(const IndexUnit& unit, std::byte* query) {
  const int head_dim = unit.kv.head_dim;
  auto* constants = reinterpret_cast<Estimate2Head*>(query);
  auto* words = reinterpret_cast<std::uint32_t*>(query + estimate2_constants_bytes(unit.group));
  HWY_ALIGN float rotated[kMaxIndexDim];
  for (int h0 = 0; h0 < unit.group;) {
    const int heads = heads_at_once(unit.group - h0);
    for (int h = 0; h < heads; ++h) {
      rotate_query(unit.q + std::int64_t{h0 + h} * head_dim, head_dim, rotated);
#if TWILIGHT_HAS_VBMI
      constants[h0 + h] = prepare_tables(rotated, head_dim, unit.scale,
                                         reinterpret_cast<std::byte*>(words) + 64 * h, heads);
#else
      constants[h0 + h] = prepare_words(rotated, head_dim, unit.scale, words + h, heads);
#endif
    }
    words += heads * estimate2_words(head_dim);
    h0 += heads;
  }
}

// Lane i of t[tile][head]: sum of q (code - 1.5) in steps, for token i of the lanes at `codes`.
#if TWILIGHT_HAS_VBMI

template <int kHeads, int kTiles>
HWY_INLINE void dot2_tiles(std::int64_t head_dim, const std::byte* const* codes,
                           const TileAhead* ahead, const std::uint32_t* words,
                           const Estimate2Head* /*heads*/, IndexVec (*t)[kHeads]) {
  __m512i acc[kTiles][kHeads];
#pragma GCC unroll 2
  for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) acc[i][h] = _mm512_setzero_si512();
  }
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const __m512i table_of_byte = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi8(1);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const auto* tables = reinterpret_cast<const std::byte*>(words);
  for (std::int64_t g = 0; g < head_dim / 16; ++g, tables += 2 * 64 * kHeads) {
    __m512i low[kTiles];
    __m512i high[kTiles];
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) {
      prefetch_ahead(ahead[i], 64 * g);
      const __m512i bytes = _mm512_loadu_si512(codes[i] + 64 * g);
      low[i] = _mm512_ternarylogic_epi32(bytes, low_nibble, table_of_byte, kAndOr);
      high[i] =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low_nibble, table_of_byte, kAndOr);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const __m512i low_table = _mm512_load_si512(tables + 64 * h);
      const __m512i high_table = _mm512_load_si512(tables + 64 * (kHeads + h));
#pragma GCC unroll 2
      for (int i = 0; i < kTiles; ++i) {
        const __m512i sum = _mm512_add_epi8(_mm512_permutexvar_epi8(low[i], low_table),
                                            _mm512_permutexvar_epi8(high[i], high_table));
        acc[i][h] = _mm512_dpbusd_epi32(acc[i][h], ones, sum);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) t[i][h] = IndexVec{_mm512_cvtepi32_ps(acc[i][h])};
  }
}

#elif TWILIGHT_INTEGER_ESTIMATES

template <int kHeads, int kTiles>
HWY_INLINE void dot2_tiles(std::int64_t head_dim, const std::byte* const* codes,
                           const TileAhead* ahead, const std::uint32_t* words,
                           const Estimate2Head* heads, IndexVec (*t)[kHeads]) {
  static_assert(kTiles == 1);
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Repartition<std::int16_t, IndexF> di16;
  const hn::Repartition<std::uint16_t, IndexF> du16;
  const auto mask = hn::Set(du16, 0x0303);
  const auto one = hn::Set(di16, 1);
  EstimateI32 acc[kHeads];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) acc[h] = hn::Zero(di32);
  // Two products of bytes are at most 2 * 3 * 127, so the sums of eight groups fit 16 bits.
  constexpr std::int64_t kGroupsAtOnce = 8;
  const std::int64_t groups = head_dim / 16;
  for (std::int64_t g0 = 0; g0 < groups; g0 += kGroupsAtOnce) {
    IndexI16 sum[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) sum[h] = hn::Zero(di16);
    for (std::int64_t g = g0; g < std::min(g0 + kGroupsAtOnce, groups); ++g, words += 4 * kHeads) {
      prefetch_ahead(ahead[0], 64 * g);
      const auto bytes = hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(codes[0] + 64 * g));
      const IndexI16 code[4] = {hn::BitCast(di16, hn::And(bytes, mask)),
                                hn::BitCast(di16, hn::And(hn::ShiftRight<2>(bytes), mask)),
                                hn::BitCast(di16, hn::And(hn::ShiftRight<4>(bytes), mask)),
                                hn::BitCast(di16, hn::And(hn::ShiftRight<6>(bytes), mask))};
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const auto product = [&](int s) HWY_ATTR {
          return multiply_add_bytes(code[s],
                                    hn::BitCast(di16, hn::Set(du32, words[s * kHeads + h])));
        };
        sum[h] = hn::Add(sum[h],
                         hn::Add(hn::Add(product(0), product(1)), hn::Add(product(2), product(3))));
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) acc[h] = hn::Add(acc[h], multiply_add_halves(sum[h], one));
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    t[0][h] = hn::Sub(hn::ConvertTo(df, acc[h]), hn::Set(df, heads[h].centre));
  }
}

#else

template <int kHeads, int kTiles>
HWY_INLINE void dot2_tiles(std::int64_t head_dim, const std::byte* const* codes,
                           const TileAhead* ahead, const std::uint32_t* words,
                           const Estimate2Head* /*heads*/, IndexVec (*t)[kHeads]) {
  static_assert(kTiles == 1);
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const hn::RebindToUnsigned<IndexF> du32;
  for (int h = 0; h < kHeads; ++h) t[0][h] = hn::Zero(df);
  for (std::int64_t g = 0; g < head_dim / 16; ++g) {
    prefetch_ahead(ahead[0], 64 * g);
    const auto lanes = hn::LoadU(du32, reinterpret_cast<const std::uint32_t*>(codes[0] + 64 * g));
    for (int c = 0; c < 16; ++c, words += kHeads) {
      // Channel c of the group: byte c % 4, bits 2 (c / 4).
      const auto code =
          hn::And(hn::ShiftRightSame(lanes, 8 * (c % 4) + 2 * (c / 4)), hn::Set(du32, 3U));
      const auto value = hn::Sub(hn::ConvertTo(df, hn::BitCast(di32, code)), hn::Set(df, 1.5F));
      for (int h = 0; h < kHeads; ++h) {
        float q;
        std::memcpy(&q, words + h, sizeof(q));
        t[0][h] = hn::MulAdd(value, hn::Set(df, q), t[0][h]);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE2_INL_H_
