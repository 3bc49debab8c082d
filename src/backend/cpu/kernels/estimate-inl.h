// Estimated scores from low-bit keys. Lane = token: 32 bits of a code vector are one token's
// channels, so a step multiplies them with a broadcast of the query's and adds within the lane.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_INL_H_

#include "backend/cpu/kernels/index_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// With queries rounded to q ~= step * qi and keys k ~= s * code + z,
//   q.k ~= s * step * sum qi (code - c) + (z + c s) sum q,   c = half the top code, sum q exact,
// so the rounding of q multiplies centred codes only. With x = max|q|:
//   4 bits: |qi| <= 127,            |error| <= D * x / 254 * 7.5 s
//   8 bits: |qi| <= 127 * 128 (two bytes, or 16-bit products), |error| <= D * x / 32512 * 128 s
// times the unit's scale. Sets without byte products use the query itself.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
#define TWILIGHT_INTEGER_ESTIMATES 1
#else
#define TWILIGHT_INTEGER_ESTIMATES 0
#endif

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

// Heads are taken 4, 2 or 1 at a time.
constexpr int heads_at_once(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Words of one head's query. A block of H heads holds them interleaved: word by word, H at a time.
inline std::int64_t estimate_words(int key_bits, int head_dim) {
  if (!TWILIGHT_INTEGER_ESTIMATES) return head_dim;
  return key_bits == 4 ? head_dim / 4 : head_dim / 2;
}

inline void round_query(const float* q, int head_dim, int levels, std::int32_t* rounded,
                        float* step) {
  float largest = 0;
  for (int d = 0; d < head_dim; ++d) largest = std::max(largest, std::fabs(q[d]));
  *step = largest / static_cast<float>(levels);
  const float inverse = *step > 0 ? 1.0F / *step : 0.0F;
  const auto limit = static_cast<float>(levels);
  for (int d = 0; d < head_dim; ++d) {
    rounded[d] =
        static_cast<std::int32_t>(std::nearbyint(std::clamp(q[d] * inverse, -limit, limit)));
  }
}

inline std::uint32_t pack_bytes(const std::int32_t* v) {
  std::uint32_t word = 0;
  for (int b = 0; b < 4; ++b) word |= (static_cast<std::uint32_t>(v[b]) & 0xffU) << (8 * b);
  return word;
}
inline std::uint32_t pack_halves(std::int32_t low, std::int32_t high) {
  return (static_cast<std::uint32_t>(low) & 0xffffU) | static_cast<std::uint32_t>(high) << 16;
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

void prepare_estimates(const IndexUnit& unit, std::byte* query) {
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
// points at their first 32-bit lanes. For every line read, one line of the tiles ahead is fetched:
// evenly spaced, the requests never fill the miss buffers (17 GB/s against 11 in bursts, Zen 4,
// scattered pages).
struct TileAhead {
  const std::byte* far = nullptr;   // kBytesAhead on, to the second level
  const std::byte* near = nullptr;  // the tile after next, to the first
};
HWY_INLINE void prefetch_ahead(const TileAhead& ahead, std::int64_t offset) {
  prefetch_line(ahead.far + offset);
  prefetch_near_line(ahead.near + offset);
}

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

using IndexI16 = hn::Vec<hn::Repartition<std::int16_t, IndexF> >;
using EstimateI32 = hn::Vec<hn::RebindToSigned<IndexF> >;

HWY_INLINE IndexI16 multiply_add_bytes(IndexI16 u, IndexI16 s) {
#if HWY_TARGET == HWY_AVX3
  return IndexI16{_mm512_maddubs_epi16(u.raw, s.raw)};
#else
  return IndexI16{_mm256_maddubs_epi16(u.raw, s.raw)};
#endif
}
HWY_INLINE EstimateI32 multiply_add_halves(IndexI16 a, IndexI16 b) {
#if HWY_TARGET == HWY_AVX3
  return EstimateI32{_mm512_madd_epi16(a.raw, b.raw)};
#else
  return EstimateI32{_mm256_madd_epi16(a.raw, b.raw)};
#endif
}

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

// --- tiles ------------------------------------------------------------------------------------

// kIndexLanes f16 values as f32.
HWY_INLINE IndexVec load_halves(const std::byte* from) { return load_row<DType::kF16>(from, 0); }

// Estimates of kHeads heads for kTiles tiles; out[i] is where head 0 of tile i goes, count[i] how
// many of its 16 slots exist.
template <int kBits, int kHeads, int kTiles>
HWY_INLINE void estimate_tiles(std::int64_t head_dim, const std::byte* const* tiles,
                               const TileAhead* ahead, const std::uint32_t* words,
                               const EstimateHead* heads, float* const* out,
                               const std::int64_t* count, std::int64_t stride) {
  const IndexF df;
  const std::int64_t code_bytes = estimate_code_bytes(kBits, static_cast<int>(head_dim));
  const IndexVec c = hn::Set(df, kBits == 4 ? kCentre4 : kCentre8);
  for (int first = 0; first < kEstimateTileTokens; first += kIndexLanes) {
    const std::byte* codes[kTiles];
    for (int i = 0; i < kTiles; ++i) codes[i] = tiles[i] + 4 * first;
    IndexVec t[kTiles][kHeads];
    dot_tiles<kBits, kHeads, kTiles>(head_dim, codes, ahead, words, heads, t);
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) {
      prefetch_ahead(ahead[i], code_bytes);
      const std::byte* scales = tiles[i] + code_bytes + 2 * first;
      const IndexVec scale = load_halves(scales);
      const IndexVec centre = hn::MulAdd(c, scale, load_halves(scales + 2 * kEstimateTileTokens));
      const std::int64_t slots = count[i] - first;
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const IndexVec rest = hn::Mul(hn::Set(df, heads[h].sum), centre);
        const IndexVec e = hn::MulAdd(hn::Mul(hn::Set(df, heads[h].step), scale), t[i][h], rest);
        float* to = out[i] + h * stride + first;
        if (slots >= kIndexLanes) {
          hn::StoreU(e, df, to);
        } else if (slots > 0) {
          HWY_ALIGN float part[kIndexLanes];
          hn::Store(e, df, part);
          std::memcpy(to, part, static_cast<std::size_t>(slots) * sizeof(float));
        }
      }
    }
  }
}

template <int kBits, int kTiles>
HWY_INLINE void estimate_all_heads(const IndexUnit& unit, const std::byte* query,
                                   const std::byte* const* tiles, const TileAhead* ahead,
                                   float* const* first_out, const std::int64_t* count,
                                   std::int64_t stride) {
  const std::int64_t head_dim = unit.kv.head_dim;
  const auto* heads = reinterpret_cast<const EstimateHead*>(query);
  const auto* words =
      reinterpret_cast<const std::uint32_t*>(query + estimate_constants_bytes(unit.group));
  const std::int64_t words_per_head = estimate_words(kBits, unit.kv.head_dim);
  float* out[kTiles];
  for (int i = 0; i < kTiles; ++i) out[i] = first_out[i];
  for (int h0 = 0; h0 < unit.group;) {
    const int block = heads_at_once(unit.group - h0);
    const EstimateHead* constants = heads + h0;
    if (block == 4) {
      estimate_tiles<kBits, 4, kTiles>(head_dim, tiles, ahead, words, constants, out, count,
                                       stride);
    } else if (block == 2) {
      estimate_tiles<kBits, 2, kTiles>(head_dim, tiles, ahead, words, constants, out, count,
                                       stride);
    } else {
      estimate_tiles<kBits, 1, kTiles>(head_dim, tiles, ahead, words, constants, out, count,
                                       stride);
    }
    for (int i = 0; i < kTiles; ++i) out[i] += block * stride;
    words += block * words_per_head;
    h0 += block;
  }
}

// Tiles that share each broadcast of the query: enough accumulators to hide the latency of the dot
// product, which one tile of four heads just does not.
constexpr int kTilesAtOnce = TWILIGHT_HAS_VNNI ? 2 : 1;

// Sealed candidates [begin, end), read from the index.
template <int kBits>
inline void estimate_range(const IndexUnit& unit, const std::byte* query, const std::int32_t* pages,
                           std::int64_t begin, std::int64_t end, float* estimates,
                           std::int64_t stride) {
  const int page_size = unit.kv.page_size;
  const std::int64_t tile_bytes = estimate_tile_bytes(kBits, unit.kv.head_dim);
  const int tiles_per_page = estimate_tiles_per_page(page_size);
  const std::int64_t record_bytes = tiles_per_page * tile_bytes;
  const auto record = [&](std::int64_t i) {
    return unit.index.estimate(unit.kv.page_of(unit.seq, pages[i]), unit.kv_head);
  };
  const std::int64_t ahead = records_ahead(record_bytes);
  for (std::int64_t i = begin; i < std::min(begin + ahead, end); ++i) {
    prefetch_record(record(i), record_bytes);
  }
  const std::byte* tiles[kTilesAtOnce];
  TileAhead ahead_of[kTilesAtOnce];
  float* out[kTilesAtOnce];
  std::int64_t count[kTilesAtOnce];
  int held = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::byte* base = record(i);
    const std::byte* far = record(std::min(i + ahead, end - 1));
    for (int tile = 0; tile < tiles_per_page; ++tile) {
      tiles[held] = base + tile * tile_bytes;
      const int near = tile + kTilesAtOnce;
      ahead_of[held] = {far + tile * tile_bytes,
                        record(std::min<std::int64_t>(i + near / tiles_per_page, end - 1)) +
                            near % tiles_per_page * tile_bytes};
      out[held] = estimates + i * page_size + tile * kEstimateTileTokens;
      count[held] = std::min(kEstimateTileTokens, page_size - tile * kEstimateTileTokens);
      if (++held < kTilesAtOnce) continue;
      estimate_all_heads<kBits, kTilesAtOnce>(unit, query, tiles, ahead_of, out, count, stride);
      held = 0;
    }
  }
  if (held > 0) estimate_all_heads<kBits, 1>(unit, query, tiles, ahead_of, out, count, stride);
}

void estimate(const IndexUnit& unit, const std::byte* query, bool exact_keys,
              const std::int32_t* pages, std::int64_t begin, std::int64_t end, float* estimates,
              std::int64_t stride) {
  const std::int64_t page_size = unit.kv.page_size;
  const std::int64_t length = unit.kv.seq_lens[unit.seq];
  const std::int32_t sealed = unit.kv.sealed_pages(unit.seq);
  const std::int64_t keys_ahead =
      exact_keys ? records_ahead(page_size * unit.kv.head_dim * dtype_bytes(unit.kv.dtype)) : 0;
  for (std::int64_t i = begin; i < end;) {
    if (!exact_keys && pages[i] < sealed) {
      std::int64_t run = i + 1;
      while (run < end && pages[run] < sealed) ++run;
      if (unit.index.format.key_bits == 4) {
        estimate_range<4>(unit, query, pages, i, run, estimates, stride);
      } else {
        estimate_range<8>(unit, query, pages, i, run, estimates, stride);
      }
      i = run;
      continue;
    }
    const std::int64_t count =
        std::clamp<std::int64_t>(length - pages[i] * page_size, 0, page_size);
    float* out = estimates + i * page_size;
    if (count > 0) {
      score_page_rows(unit, unit.kv.page_of(unit.seq, pages[i]),
                      unit.kv.page_of(unit.seq, pages[std::min(i + keys_ahead, end - 1)]), 0, count,
                      out, stride);
    }
    for (int h = 0; h < unit.group; ++h) {
      std::fill(out + h * stride + count, out + h * stride + page_size,
                -std::numeric_limits<float>::infinity());
    }
    ++i;
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ESTIMATE_INL_H_
