// Products of queries with 4-bit and 8-bit keys. Lane = token: 32 bits of a code vector are one
// token's channels, so a step multiplies them with a broadcast of the query's and adds within the
// lane.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_INL_H_

#include "backend/cpu/kernels/estimate_query-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// With queries rounded to q ~= step * qi and keys k ~= s * code + z,
//   q.k ~= s * step * sum qi (code - c) + (z + c s) sum q,   c = half the top code, sum q exact,
// so the rounding of q multiplies centred codes only. With x = max|q|:
//   4 bits: |qi| <= 127,            |error| <= D * x / 254 * 7.5 s
//   8 bits: |qi| <= 127 * 128 (two bytes, or 16-bit products), |error| <= D * x / 32512 * 128 s
// times the unit's scale. Sets without byte products use the query itself.

// Constants of one head; the dot products give t = sum qi (code - c).
struct EstimateHead {
  float step = 0;       // unit scale * step
  float sum = 0;        // unit scale * sum q
  float centre_hi = 0;  // c * sum of the high (or only) parts; 0 where codes come centred
  float centre_lo = 0;
};

constexpr float kCentre4 = 7.5F;
// 8-bit codes are centred on 128 where that is a subtraction of integers.
constexpr float kCentre8 = TWILIGHT_HAS_VNNI ? 127.5F : 128.0F;

// Words of one head's query. A block of H heads holds them interleaved: word by word, H at a time.
inline std::int64_t estimate_words(int key_bits, int head_dim) {
  if (!TWILIGHT_INTEGER_ESTIMATES) return head_dim;
  return key_bits == 4 ? head_dim / 4 : head_dim / 2;
}

// `words` is the head's first word, `stride` the distance to its next.
inline EstimateHead prepare_estimate_head(int key_bits, int head_dim, const float* q, float scale,
                                          std::uint32_t* words, int stride) {
  double sum = 0;
  for (int d = 0; d < head_dim; ++d) sum += q[d];
  EstimateHead head;
  head.sum = static_cast<float>(scale * sum);
#if TWILIGHT_INTEGER_ESTIMATES
  std::int32_t rounded[512];
  float step;
  round_query(q, head_dim, key_bits == 4 ? 127 : 127 * 128, rounded, &step);
  head.step = scale * step;
  if (key_bits == 4) {
    std::int32_t total = 0;
    for (int d = 0; d < head_dim; ++d) total += rounded[d];
    head.centre_hi = kCentre4 * static_cast<float>(total);
    for (int w = 0; w < head_dim / 4; ++w) words[w * stride] = pack_bytes(rounded + 4 * w);
    return head;
  }
  if (TWILIGHT_HAS_VNNI) {
    // qi = 128 hi + lo, hi in [-127, 127], lo in [-64, 63].
    std::int32_t hi[512];
    std::int32_t lo[512];
    std::int32_t total_hi = 0;
    std::int32_t total_lo = 0;
    for (int d = 0; d < head_dim; ++d) {
      hi[d] = (rounded[d] + 64) >> 7;
      lo[d] = rounded[d] - 128 * hi[d];
      total_hi += hi[d];
      total_lo += lo[d];
    }
    head.centre_hi = kCentre8 * static_cast<float>(total_hi);
    head.centre_lo = kCentre8 * static_cast<float>(total_lo);
    for (int w = 0; w < head_dim / 4; ++w) {
      words[(2 * w) * stride] = pack_bytes(hi + 4 * w);
      words[(2 * w + 1) * stride] = pack_bytes(lo + 4 * w);
    }
    return head;
  }
  for (int w = 0; w < head_dim / 4; ++w) {
    const std::int32_t* v = rounded + 4 * w;
    words[(2 * w) * stride] = pack_halves(v[0], v[2]);
    words[(2 * w + 1) * stride] = pack_halves(v[1], v[3]);
  }
#else
  (void)key_bits;
  head.step = scale;
  for (int d = 0; d < head_dim; ++d) std::memcpy(words + d * stride, q + d, sizeof(float));
#endif
  return head;
}

// The constants of all heads, then the words of one block of heads after another.
inline std::int64_t estimate_constants_bytes(int group) {
  return static_cast<std::int64_t>(
      align_up(static_cast<std::size_t>(group) * sizeof(EstimateHead)));
}

inline void prepare_plain_estimates(const IndexUnit& unit, std::byte* query) {
  const int head_dim = unit.kv.head_dim;
  const int key_bits = unit.index.format.key_bits;
  auto* constants = reinterpret_cast<EstimateHead*>(query);
  auto* words = reinterpret_cast<std::uint32_t*>(query + estimate_constants_bytes(unit.group));
  for (int h0 = 0; h0 < unit.group;) {
    const int heads = heads_at_once(unit.group - h0);
    for (int h = 0; h < heads; ++h) {
      constants[h0 + h] =
          prepare_estimate_head(key_bits, head_dim, unit.q + std::int64_t{h0 + h} * head_dim,
                                unit.scale, words + h, heads);
    }
    words += heads * estimate_words(key_bits, head_dim);
    h0 += heads;
  }
}

// --- dot products -----------------------------------------------------------------------------
//
// dot_tiles<kBits, kHeads, kTiles> gives t[tile][head] for kIndexLanes tokens of each tile; `codes`
// points at their first 32-bit lanes.

#if TWILIGHT_HAS_VNNI

template <int kBits, int kHeads, int kTiles>
HWY_INLINE void dot_tiles(std::int64_t head_dim, const std::byte* const* codes,
                          const TileAhead* ahead, const std::uint32_t* words,
                          const EstimateHead* heads, IndexVec (*t)[kHeads]) {
  const IndexF df;
  constexpr int kParts = kBits == 4 ? 1 : 2;
  __m512i acc[kTiles][kHeads][kParts];
#pragma GCC unroll 2
  for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) acc[i][h][part] = _mm512_setzero_si512();
    }
  }
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const std::int64_t groups = head_dim * kBits / 32;
  for (std::int64_t g = 0; g < groups; ++g, words += 2 * kHeads) {
    // Two vectors of codes (low, high nibbles) with one part of the query, or one with two parts.
    __m512i code[kTiles][2];
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) {
      prefetch_ahead(ahead[i], 64 * g);
      const __m512i bytes = _mm512_loadu_si512(codes[i] + 64 * g);
      if constexpr (kBits == 4) {
        code[i][0] = _mm512_and_si512(bytes, low_nibble);
        code[i][1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_nibble);
      } else {
        code[i][0] = bytes;
        code[i][1] = bytes;
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const __m512i word = _mm512_set1_epi32(static_cast<int>(words[k * kHeads + h]));
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) {
          __m512i& sum = acc[i][h][kParts == 1 ? 0 : k];
          sum = _mm512_dpbusd_epi32(sum, code[i][k], word);
        }
      }
    }
  }
  // Sums and centres stay below 2^24 (in units of 1/2), so these differences are exact.
#pragma GCC unroll 2
  for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const auto centred = [&](int part, float centre) HWY_ATTR {
        return hn::Sub(IndexVec{_mm512_cvtepi32_ps(acc[i][h][part])}, hn::Set(df, centre));
      };
      t[i][h] = centred(0, heads[h].centre_hi);
      if constexpr (kParts == 2) {
        t[i][h] = hn::MulAdd(hn::Set(df, 128.0F), t[i][h], centred(1, heads[h].centre_lo));
      }
    }
  }
}

#elif TWILIGHT_INTEGER_ESTIMATES

template <int kBits, int kHeads, int kTiles>
HWY_INLINE void dot_tiles(std::int64_t head_dim, const std::byte* const* codes,
                          const TileAhead* ahead, const std::uint32_t* words,
                          const EstimateHead* heads, IndexVec (*t)[kHeads]) {
  static_assert(kTiles == 1);
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Repartition<std::int16_t, IndexF> di16;
  const hn::Repartition<std::uint16_t, IndexF> du16;
  EstimateI32 acc[kHeads];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) acc[h] = hn::Zero(di32);
  const std::int64_t groups = head_dim * kBits / 32;
  const auto load = [&](std::int64_t g) HWY_ATTR {
    prefetch_ahead(ahead[0], 64 * g);
    return hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(codes[0] + 64 * g));
  };
  const auto word = [&](int k) HWY_ATTR { return hn::BitCast(di16, hn::Set(du32, words[k])); };
  if constexpr (kBits == 4) {
    // A product of two bytes pairs is at most 2 * 15 * 127, so four of them fit 16 bits; head_dim /
    // 8 groups are an even number.
    const auto low_nibble = hn::Set(du16, 0x0f0f);
    for (std::int64_t g = 0; g < groups; g += 2, words += 4 * kHeads) {
      const auto bytes0 = load(g);
      const auto bytes1 = load(g + 1);
      const auto c0 = hn::BitCast(di16, hn::And(bytes0, low_nibble));
      const auto c1 = hn::BitCast(di16, hn::And(hn::ShiftRight<4>(bytes0), low_nibble));
      const auto c2 = hn::BitCast(di16, hn::And(bytes1, low_nibble));
      const auto c3 = hn::BitCast(di16, hn::And(hn::ShiftRight<4>(bytes1), low_nibble));
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const auto sum01 =
            hn::Add(multiply_add_bytes(c0, word(h)), multiply_add_bytes(c1, word(kHeads + h)));
        const auto sum23 = hn::Add(multiply_add_bytes(c2, word(2 * kHeads + h)),
                                   multiply_add_bytes(c3, word(3 * kHeads + h)));
        acc[h] = hn::Add(acc[h], multiply_add_halves(hn::Add(sum01, sum23), hn::Set(di16, 1)));
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      t[0][h] = hn::Sub(hn::ConvertTo(df, acc[h]), hn::Set(df, heads[h].centre_hi));
    }
  } else {
    // Byte products would saturate; codes minus 128 as 16-bit numbers do not, and D of them with
    // |qi| <= 127 * 128 stay below 2^31.
    const auto low_byte = hn::Set(du16, 0x00ff);
    const auto centre = hn::Set(di16, 128);
    for (std::int64_t g = 0; g < groups; ++g, words += 2 * kHeads) {
      const auto bytes = load(g);
      const auto c02 = hn::Sub(hn::BitCast(di16, hn::And(bytes, low_byte)), centre);
      const auto c13 = hn::Sub(hn::BitCast(di16, hn::ShiftRight<8>(bytes)), centre);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        acc[h] = hn::Add(acc[h], hn::Add(multiply_add_halves(c02, word(h)),
                                         multiply_add_halves(c13, word(kHeads + h))));
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) t[0][h] = hn::ConvertTo(df, acc[h]);
  }
}

#else

template <int kBits, int kHeads, int kTiles>
HWY_INLINE void dot_tiles(std::int64_t head_dim, const std::byte* const* codes,
                          const TileAhead* ahead, const std::uint32_t* words,
                          const EstimateHead* /*heads*/, IndexVec (*t)[kHeads]) {
  static_assert(kTiles == 1);
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const hn::RebindToUnsigned<IndexF> du32;
  const auto centre = hn::Set(df, kBits == 4 ? kCentre4 : kCentre8);
  const auto mask = hn::Set(du32, kBits == 4 ? 15U : 255U);
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) t[0][h] = hn::Zero(df);
  const std::int64_t groups = head_dim * kBits / 32;
  for (std::int64_t g = 0; g < groups; ++g) {
    prefetch_ahead(ahead[0], 64 * g);
    const auto lanes = hn::LoadU(du32, reinterpret_cast<const std::uint32_t*>(codes[0] + 64 * g));
    for (int c = 0; c < 32 / kBits; ++c) {
      // Channel c of the group: byte c % 4, low nibbles first.
      const int shift = 8 * (c % 4) + 4 * (c / 4);
      const auto code = hn::And(hn::ShiftRightSame(lanes, shift), mask);
      const auto value = hn::Sub(hn::ConvertTo(df, hn::BitCast(di32, code)), centre);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h, ++words) {
        float q;
        std::memcpy(&q, words, sizeof(q));
        t[0][h] = hn::MulAdd(value, hn::Set(df, q), t[0][h]);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_INL_H_
