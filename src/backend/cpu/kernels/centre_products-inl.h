// Products of queries with the 4-bit means of pages. Lane = page: sixteen records are turned into
// vectors of one 32-bit word each, so a step multiplies them with a broadcast of the query's and
// adds within the lane.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_CENTRE_PRODUCTS_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_CENTRE_PRODUCTS_INL_H_

#include "backend/cpu/kernels/estimate_query-inl.h"
#include "backend/cpu/kernels/rotate-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// With rotated queries rounded to q ~= step * qi, |qi| <= 127, and means m ~= s (code - 7.5),
//   q.m ~= s step (sum qi code - 7.5 sum qi),   |error| <= D max|q| / 254 * 7.5 s.
// The products are integers below 2^24, so nothing else rounds before the scales. Sets without
// byte products use the query itself.
struct CentreHead {
  float step = 0;    // unit scale * step
  float centre = 0;  // 7.5 sum qi; 0 where codes come centred
  float spread = 0;  // (unit scale)^2 |q|^2 / 2
  float unused = 0;
};

// The constants of all heads, then the words of one block of heads after another.
inline std::int64_t centre_constants_bytes(int group) {
  return static_cast<std::int64_t>(align_up(static_cast<std::size_t>(group) * sizeof(CentreHead)));
}
inline std::int64_t centre_words(int head_dim) {
  return TWILIGHT_INTEGER_ESTIMATES ? head_dim / 4 : head_dim;
}

void prepare_centres(const IndexUnit& unit, std::byte* query) {
  const int head_dim = unit.kv.head_dim;
  auto* constants = reinterpret_cast<CentreHead*>(query);
  auto* words = reinterpret_cast<std::uint32_t*>(query + centre_constants_bytes(unit.group));
  HWY_ALIGN float rotated[kMaxIndexDim];
  for (int h0 = 0; h0 < unit.group;) {
    const int heads = heads_at_once(unit.group - h0);
    for (int h = 0; h < heads; ++h) {
      rotate_query(unit.q + std::int64_t{h0 + h} * head_dim, head_dim, rotated);
      CentreHead head;
      double square = 0;
      for (int d = 0; d < head_dim; ++d) square += double{rotated[d]} * double{rotated[d]};
      head.spread = static_cast<float>(0.5 * double{unit.scale} * double{unit.scale} * square);
#if TWILIGHT_INTEGER_ESTIMATES
      std::int32_t rounded[kMaxIndexDim];
      float step;
      round_query(rotated, head_dim, 127, rounded, &step);
      std::int32_t total = 0;
      for (int d = 0; d < head_dim; ++d) total += rounded[d];
      head.step = unit.scale * step;
      head.centre = 7.5F * static_cast<float>(total);
      for (int w = 0; w < head_dim / 4; ++w) words[w * heads + h] = pack_bytes(rounded + 4 * w);
#else
      head.step = unit.scale;
      for (int d = 0; d < head_dim; ++d) std::memcpy(words + d * heads + h, rotated + d, 4);
#endif
      constants[h0 + h] = head;
    }
    words += heads * centre_words(head_dim);
    h0 += heads;
  }
}

// --- products ---------------------------------------------------------------------------------

using CentreU32 = hn::Vec<hn::RebindToUnsigned<IndexF>>;

// Bytes [16 k, 16 k + 16) of rows i, i + 4, ...: one row a 128-bit block.
HWY_INLINE CentreU32 load_blocks(const std::byte* const* rows, int i, std::int64_t offset) {
#if HWY_TARGET == HWY_AVX3
  const auto block = [&](int r) HWY_ATTR {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
  };
  __m512i v = _mm512_castsi128_si512(block(i));
  v = _mm512_inserti32x4(v, block(i + 4), 1);
  v = _mm512_inserti32x4(v, block(i + 8), 2);
  return CentreU32{_mm512_inserti32x4(v, block(i + 12), 3)};
#else
  const hn::RebindToUnsigned<IndexF> du32;
  if constexpr (kIndexLanes == 8) {
    const hn::Half<decltype(du32)> dh;
    const auto block = [&](int r) HWY_ATTR {
      return hn::LoadU(dh, reinterpret_cast<const std::uint32_t*>(rows[r] + offset));
    };
    return hn::Combine(du32, block(i + 4), block(i));
  } else {
    return hn::LoadU(du32, reinterpret_cast<const std::uint32_t*>(rows[i] + offset));
  }
#endif
}

// From the blocks u[i] of rows i, i + 4, ... to vectors of one word each, lane = row.
HWY_INLINE void interleave_blocks(const CentreU32* u, CentreU32* v) {
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Repartition<std::uint64_t, IndexF> du64;
  const auto lo01 = hn::BitCast(du64, hn::InterleaveLower(du32, u[0], u[1]));
  const auto lo23 = hn::BitCast(du64, hn::InterleaveLower(du32, u[2], u[3]));
  const auto hi01 = hn::BitCast(du64, hn::InterleaveUpper(du32, u[0], u[1]));
  const auto hi23 = hn::BitCast(du64, hn::InterleaveUpper(du32, u[2], u[3]));
  v[0] = hn::BitCast(du32, hn::InterleaveLower(du64, lo01, lo23));
  v[1] = hn::BitCast(du32, hn::InterleaveUpper(du64, lo01, lo23));
  v[2] = hn::BitCast(du32, hn::InterleaveLower(du64, hi01, hi23));
  v[3] = hn::BitCast(du32, hn::InterleaveUpper(du64, hi01, hi23));
}

// Lane r of v[k]: the 32-bit word at rows[r] + offset + 4 k.
HWY_INLINE void transpose_words(const std::byte* const* rows, std::int64_t offset, CentreU32* v) {
  CentreU32 u[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) u[i] = load_blocks(rows, i, offset);
  interleave_blocks(u, v);
}

// Adds the products of kWords words of codes (8 channels each) to acc.
#if TWILIGHT_INTEGER_ESTIMATES
using CentreAcc = hn::Vec<hn::RebindToSigned<IndexF>>;
#else
using CentreAcc = IndexVec;
#endif

// Vectors of a page that share each broadcast of the query. Byte products finish late: with eight
// sums under way instead of four their latency is hidden.
constexpr int kRowsAtOnce = TWILIGHT_HAS_VNNI ? 2 : 1;

// `between` runs after each word, for work that the products leave room for.
template <int kHeads, int kRows, int kWords, typename Between>
HWY_INLINE void add_products(const CentreU32 (*v)[4], const std::uint32_t* words,
                             CentreAcc (*acc)[kHeads], const Between& between) {
#if TWILIGHT_HAS_VNNI
  const __m512i low_nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int k = 0; k < kWords; ++k) {
    __m512i code[2][kRows];
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      code[0][i] = _mm512_and_si512(v[i][k].raw, low_nibble);
      code[1][i] = _mm512_and_si512(_mm512_srli_epi16(v[i][k].raw, 4), low_nibble);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const __m512i word =
            _mm512_set1_epi32(static_cast<int>(words[(2 * k + half) * kHeads + h]));
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
          acc[i][h].raw = _mm512_dpbusd_epi32(acc[i][h].raw, code[half][i], word);
        }
      }
    }
    between(k);
  }
#elif TWILIGHT_INTEGER_ESTIMATES
  static_assert(kRows == 1);
  // Two products of bytes are at most 2 * 15 * 127, so eight such sums fit 16 bits.
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Repartition<std::int16_t, IndexF> di16;
  const hn::Repartition<std::uint16_t, IndexF> du16;
  const auto low_nibble = hn::Set(du16, 0x0f0f);
  IndexI16 lo[kWords];
  IndexI16 hi[kWords];
#pragma GCC unroll 4
  for (int k = 0; k < kWords; ++k) {
    const auto bytes = hn::BitCast(du16, v[0][k]);
    lo[k] = hn::BitCast(di16, hn::And(bytes, low_nibble));
    hi[k] = hn::BitCast(di16, hn::And(hn::ShiftRight<4>(bytes), low_nibble));
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    IndexI16 sum = hn::Zero(di16);
#pragma GCC unroll 4
    for (int k = 0; k < kWords; ++k) {
      const auto word = [&](int half) HWY_ATTR {
        return hn::BitCast(di16, hn::Set(du32, words[(2 * k + half) * kHeads + h]));
      };
      sum = hn::Add(
          sum, hn::Add(multiply_add_bytes(lo[k], word(0)), multiply_add_bytes(hi[k], word(1))));
    }
    acc[0][h] = hn::Add(acc[0][h], multiply_add_halves(sum, hn::Set(di16, 1)));
  }
  for (int k = 0; k < kWords; ++k) between(k);
#else
  static_assert(kRows == 1);
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::RebindToSigned<IndexF> di32;
  for (int k = 0; k < kWords; ++k) {
    for (int c = 0; c < 8; ++c, words += kHeads) {
      // Channel c of the word: byte c % 4, low nibbles first.
      const auto code =
          hn::And(hn::ShiftRightSame(v[0][k], 8 * (c % 4) + 4 * (c / 4)), hn::Set(du32, 15U));
      const IndexVec value = hn::Sub(hn::ConvertTo(df, hn::BitCast(di32, code)), hn::Set(df, 7.5F));
      for (int h = 0; h < kHeads; ++h) {
        float q;
        std::memcpy(&q, words + h, sizeof(q));
        acc[0][h] = hn::MulAdd(value, hn::Set(df, q), acc[0][h]);
      }
    }
    between(k);
  }
#endif
}

// Rows that a later batch reads, fetched a few lines a step: a record of 64 bytes takes four steps.
struct RowsAhead {
  const std::byte* const* near = nullptr;  // of the next batch, to the first level; null for none
  const std::byte* const* far = nullptr;   // kBytesAhead on, to the second

  // At byte `at` of the rows that start `offset` from those pointers.
  HWY_INLINE void fetch(std::int64_t offset, std::int64_t at) const {
    constexpr int kRowsAStep = kIndexLanes / 4;
    const auto first = static_cast<int>(at / 16 % 4) * kRowsAStep;
    const std::int64_t line = offset + (at & ~std::int64_t{63});
    if (near != nullptr) {
#pragma GCC unroll 4
      for (int r = 0; r < kRowsAStep; ++r) prefetch_near_line(near[first + r] + line);
    }
    if (far != nullptr) {
#pragma GCC unroll 4
      for (int r = 0; r < kRowsAStep; ++r) prefetch_line(far[first + r] + line);
    }
  }
};

// Lane r of t[i][h]: sum over channels of qi (code - 7.5) for the i-th of kRows 4-bit vectors, one
// after another from codes[r] + first on, head h.
template <int kHeads, int kRows>
HWY_INLINE void centre_products(int head_dim, const std::byte* const* codes, std::int64_t first,
                                const RowsAhead& ahead, const std::uint32_t* words,
                                const CentreHead* heads, IndexVec (*t)[kHeads]) {
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  CentreAcc acc[kRows][kHeads];
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#if TWILIGHT_INTEGER_ESTIMATES
      acc[i][h] = hn::Zero(hn::RebindToSigned<IndexF>());
#else
      acc[i][h] = hn::Zero(df);
#endif
    }
  }
  const std::int64_t chunk_words = 4 * (centre_words(32) / 4) * kHeads;
  std::int64_t offset = 0;
  const std::int64_t bytes = nibble_bytes(head_dim);
  const std::int64_t whole = bytes & ~std::int64_t{15};
  const auto load = [&](int i, int k, std::int64_t at)
                        HWY_ATTR { return load_blocks(codes, k, first + i * bytes + at); };
  // Blocks of the next chunk are loaded among the products of this one: put before them they would
  // wait behind those of the chunk before.
  CentreU32 u[kRows][4];
  if (whole > 0) {
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) u[i][k] = load(i, k, 0);
    }
  }
  for (; offset < whole; offset += 16, words += chunk_words) {
    CentreU32 v[kRows][4];
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      ahead.fetch(first + i * bytes, offset);
      interleave_blocks(u[i], v[i]);
    }
    const std::int64_t next = offset + 16 < whole ? offset + 16 : offset;
    add_products<kHeads, kRows, 4>(v, words, acc, [&](int k) HWY_ATTR {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) u[i][k] = load(i, k, next);
    });
  }
  if (offset < bytes) {
    // Half a chunk, two words a row.
    CentreU32 v[kRows][4];
    for (int i = 0; i < kRows; ++i) {
      HWY_ALIGN std::uint32_t word[2][kIndexLanes];
      for (int r = 0; r < kIndexLanes; ++r) {
        const std::byte* from = codes[r] + first + i * bytes + offset;
        std::memcpy(&word[0][r], from, 4);
        std::memcpy(&word[1][r], from + 4, 4);
      }
      v[i][0] = hn::Load(du32, word[0]);
      v[i][1] = hn::Load(du32, word[1]);
    }
    add_products<kHeads, kRows, 2>(v, words, acc, [](int) {});
  }
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#if TWILIGHT_INTEGER_ESTIMATES
      t[i][h] = hn::Sub(hn::ConvertTo(df, acc[i][h]), hn::Set(df, heads[h].centre));
#else
      t[i][h] = acc[i][h];
      (void)heads;
#endif
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_CENTRE_PRODUCTS_INL_H_
