// Products of queries with the 4-bit means of pages, and the page scores made of them. Lane = page:
// sixteen records are turned into vectors of one 32-bit word each, so a step multiplies them with a
// broadcast of the query's and adds within the lane.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_CENTROID_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_CENTROID_INL_H_

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

// --- dots of a batch of pages -----------------------------------------------------------------

// Most means and other 4-bit vectors of a page.
constexpr int kMostRows = kSubCentroids;

// Up to kIndexLanes pages: where their vectors and scales are. Lanes past `count` repeat the last
// page.
struct CentreBatch {
  const std::byte* codes[kIndexLanes];  // the first vector; others follow every nibble_bytes
  const std::byte* params[kIndexLanes];

  template <typename PageAt>
  HWY_INLINE void fill(const IndexUnit& unit, int count, const PageAt& page_at) {
    const KeyIndexView& index = unit.index;
    const std::int32_t* table = unit.kv.block_table + unit.seq * unit.kv.block_table_stride;
    const std::byte* first_codes =
        index.centres(0, unit.kv_head, unit.kv.page_size, unit.kv.head_dim);
    const auto* first_params =
        reinterpret_cast<const std::byte*>(index.page_params(0, unit.kv_head));
    const std::int64_t stride =
        index.format.own_centre() ? index.estimate_page_stride : index.summary_page_stride;
    for (int r = 0; r < kIndexLanes; ++r) {
      const std::int64_t page = table[page_at(std::min(r, count - 1))];
      codes[r] = first_codes + page * stride;
      params[r] = first_params + page * index.params_page_stride;
      prefetch_line(params[r]);
    }
  }
};

// Lane r: the scales of page r, and its variance.
struct CentreScales {
  IndexVec scale[kMostRows];
  IndexVec variance;
};

HWY_INLINE IndexVec halves_as_floats(CentreU32 halves) {
  const hn::Rebind<std::uint16_t, IndexF> du16;
  HWY_ALIGN std::uint16_t bits[kIndexLanes];
  hn::Store(hn::TruncateTo(du16, halves), du16, bits);
  return load_row<DType::kF16>(reinterpret_cast<const std::byte*>(bits), 0);
}

HWY_INLINE CentreScales centre_scales(const CentreBatch& batch) {
  static_assert(offsetof(PageParams, variance) == 2 * kSubCentroids);
  const hn::RebindToUnsigned<IndexF> du32;
  const auto low = hn::Set(du32, 0xffff);
  CentreU32 v[4];
  transpose_words(batch.params, 0, v);
  CentreScales scales;
#pragma GCC unroll 2
  for (int i = 0; i < kMostRows; i += 2) {
    scales.scale[i] = halves_as_floats(hn::And(v[i / 2], low));
    scales.scale[i + 1] = halves_as_floats(hn::ShiftRight<16>(v[i / 2]));
  }
  scales.variance = halves_as_floats(hn::And(v[2], low));
  return scales;
}

// Scaled dots of `rows_per_page` vectors of each page with kHeads heads: dots[row][head].
template <int kHeads>
HWY_INLINE void batch_dots(int head_dim, const CentreBatch& batch, const CentreScales& scales,
                           const CentreBatch* next, const CentreBatch* far, int rows_per_page,
                           const std::uint32_t* words, const CentreHead* heads,
                           IndexVec (*dots)[kHeads]) {
  const IndexF df;
  const RowsAhead ahead = {next == nullptr ? nullptr : next->codes,
                           far == nullptr ? nullptr : far->codes};
  const auto run = [&]<int kRows>(int i) HWY_ATTR {
    IndexVec t[kRows][kHeads];
    centre_products<kHeads, kRows>(head_dim, batch.codes, i * nibble_bytes(head_dim), ahead, words,
                                   heads, t);
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        dots[i + k][h] = hn::Mul(hn::Mul(hn::Set(df, heads[h].step), scales.scale[i + k]), t[k][h]);
      }
    }
  };
  int i = 0;
  for (; i + kRowsAtOnce <= rows_per_page; i += kRowsAtOnce) {
    run.template operator()<kRowsAtOnce>(i);
  }
  for (; i < rows_per_page; ++i) run.template operator()<1>(i);
}

// The first `count` lanes.
HWY_INLINE void store_lanes(IndexVec v, int count, float* to) {
  const IndexF df;
  if (count >= kIndexLanes) {
    hn::StoreU(v, df, to);
    return;
  }
  HWY_ALIGN float lanes[kIndexLanes];
  hn::Store(v, df, lanes);
  std::memcpy(to, lanes, static_cast<std::size_t>(count) * sizeof(float));
}

// Dots of the page's means, page by page: `count` pages of one head.
template <int kHeads>
HWY_INLINE void store_dots(const IndexVec (*dots)[kHeads], int head, int centres, int count,
                           float* to) {
  const IndexF df;
  if (centres == 1) {
    store_lanes(dots[0][head], count, to);
    return;
  }
  const auto interleave = [&](float* out) HWY_ATTR {
    if (centres == 2) {
      hn::StoreInterleaved2(dots[0][head], dots[1][head], df, out);
    } else {
      hn::StoreInterleaved4(dots[0][head], dots[1][head], dots[2][head], dots[3][head], df, out);
    }
  };
  if (count >= kIndexLanes) {
    interleave(to);
    return;
  }
  HWY_ALIGN float lanes[kSubCentroids * kIndexLanes];
  interleave(lanes);
  std::memcpy(to, lanes, sizeof(float) * static_cast<std::size_t>(centres * count));
}

// Means that centre the estimates of a page: 1, 2 or kSubCentroids.
inline int centre_count(const IndexFormat& format) {
  return std::max(1, num_centroids(format.summary));
}

// Dots of a batch's means with heads [first_head, first_head + heads):
// out[(head - first_head) * head_stride + page * centres + i].
HWY_INLINE void centre_dots(const IndexUnit& unit, const std::byte* query, const CentreBatch& batch,
                            const CentreBatch* next, int count, int first_head, int heads,
                            float* out, std::int64_t head_stride) {
  const int head_dim = unit.kv.head_dim;
  const int centres = centre_count(unit.index.format);
  const CentreScales scales = centre_scales(batch);
  const auto* constants = reinterpret_cast<const CentreHead*>(query);
  const auto* words =
      reinterpret_cast<const std::uint32_t*>(query + centre_constants_bytes(unit.group)) +
      first_head * centre_words(head_dim);
  const auto run = [&]<int kHeads>(int h0) HWY_ATTR {
    IndexVec dots[kMostRows][kHeads];
    batch_dots<kHeads>(head_dim, batch, scales, h0 == 0 ? next : nullptr, nullptr, centres, words,
                       constants + first_head + h0, dots);
    for (int h = 0; h < kHeads; ++h) {
      store_dots<kHeads>(dots, h, centres, count, out + (h0 + h) * head_stride);
    }
    words += kHeads * centre_words(head_dim);
  };
  for_head_blocks(heads, run);
}

// --- exponentials and logarithms --------------------------------------------------------------

// The larger of each lane, `best` where `e` is NaN.
HWY_INLINE IndexVec larger_known(IndexVec e, IndexVec best) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  return hn::Max(e, best);  // the second operand where one is NaN
#else
  return hn::IfThenElse(hn::Gt(e, best), e, best);
#endif
}

// exp(x) for x <= 0 within 2^-22 max(1, |x| / 4) of itself, so a sum with a 1 in it is within
// 2^-22; exp(-87), which no such sum notices, below that and for NaN. Degree 5 for 2^r: 9.1e-8.
HWY_INLINE IndexVec mass_exp(IndexVec x) {
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const IndexVec rounder = hn::Set(df, 0x1.8p23F);
  const IndexVec y = hn::Mul(larger_known(x, hn::Set(df, -87.0F)), hn::Set(df, 1.44269504F));
  const IndexVec shifted = hn::Add(y, rounder);
  const IndexVec r = hn::Sub(y, hn::Sub(shifted, rounder));
  IndexVec p = hn::Set(df, 0.0013264695880934596F);
  p = hn::MulAdd(p, r, hn::Set(df, 0.009671512991189957F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.05550733953714371F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.24022242426872253F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.6931470036506653F));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0F));
  const auto power = hn::Add(hn::BitCast(di32, p), hn::ShiftLeft<23>(hn::BitCast(di32, shifted)));
  return hn::BitCast(df, power);
}

// log(x) for normal x >= 1, error below 2^-22 max(1, log x): x = 2^n m, m in [2^-1/2, 2^1/2),
// log m = 2 atanh((m - 1) / (m + 1)).
HWY_INLINE IndexVec mass_log(IndexVec x) {
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const auto bits = hn::BitCast(di32, x);
  // 0x3f3504f3 is 2^-1/2.
  const auto n = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di32, 0x3f3504f3)));
  const IndexVec m = hn::BitCast(df, hn::Sub(bits, hn::ShiftLeft<23>(n)));
  const IndexVec one = hn::Set(df, 1.0F);
  const IndexVec s = hn::Div(hn::Sub(m, one), hn::Add(m, one));
  const IndexVec z = hn::Mul(s, s);
  IndexVec p = hn::Set(df, 2.0F / 9);
  p = hn::MulAdd(p, z, hn::Set(df, 2.0F / 7));
  p = hn::MulAdd(p, z, hn::Set(df, 2.0F / 5));
  p = hn::MulAdd(p, z, hn::Set(df, 2.0F / 3));
  p = hn::MulAdd(hn::Mul(p, z), s, hn::Add(s, s));
  const IndexVec exponent = hn::ConvertTo(df, n);
  p = hn::MulAdd(exponent, hn::Set(df, -2.12194440e-4F), p);
  return hn::MulAdd(exponent, hn::Set(df, 0.693359375F), p);
}

// --- page scores ------------------------------------------------------------------------------

// Log masses of a batch of pages from its dots (ops/params.h), heads side by side so that their
// chains overlap. `spread` is v. kRuns 0 takes any number.
template <int kRuns, int kHeads>
HWY_INLINE void sub_centroid_masses(const IndexVec (*dots)[kHeads], int num_runs,
                                    const float* covered, const IndexVec* spread,
                                    IndexVec* masses) {
  const IndexF df;
  const int runs = kRuns == 0 ? num_runs : kRuns;
  IndexVec top[kHeads];
  IndexVec sum[kHeads];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    top[h] = dots[0][h];
    sum[h] = hn::Zero(df);
#pragma GCC unroll 4
    for (int i = 1; i < runs; ++i) top[h] = hn::Max(top[h], dots[i][h]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < runs; ++i) {
    const IndexVec tokens = hn::Set(df, covered[i]);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      sum[h] = hn::MulAdd(tokens, mass_exp(hn::Sub(dots[i][h], top[h])), sum[h]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    masses[h] = hn::Add(hn::Add(top[h], mass_log(sum[h])), spread[h]);
  }
}
template <int kHeads>
HWY_INLINE IndexVec centroid_mass(const IndexVec (*dots)[kHeads], int head, float others,
                                  IndexVec spread) {
  const IndexF df;
  const IndexVec deviant = dots[1][head];
  if (others == 0) return hn::Add(dots[0][head], deviant);
  const IndexVec top = hn::Max(deviant, spread);
  const IndexVec sum = hn::MulAdd(hn::Set(df, others), mass_exp(hn::Sub(spread, top)),
                                  mass_exp(hn::Sub(deviant, top)));
  return hn::Add(dots[0][head], hn::Add(top, mass_log(sum)));
}

void log_masses(const IndexUnit& unit, const std::byte* query, std::int64_t page_begin,
                std::int64_t page_end, float* masses, std::int64_t stride, float* dots_out,
                std::int64_t dot_stride) {
  const IndexF df;
  const int head_dim = unit.kv.head_dim;
  const int page_size = unit.kv.page_size;
  const IndexFormat& format = unit.index.format;
  const int centres = centre_count(format);
  const bool sub = centres > 1;
  const int rows_per_page = sub ? centres : 2;
  const std::int64_t record_bytes = summary_record_bytes(format.summary, head_dim);
  float covered[kSubCentroids] = {};
  int runs = 0;
  const int tokens = centroid_tokens(format.summary, page_size);
  for (; sub && runs < centres && runs * tokens < page_size; ++runs) {
    covered[runs] = static_cast<float>(std::min(tokens, page_size - runs * tokens));
  }
  const auto* constants = reinterpret_cast<const CentreHead*>(query);
  const auto* first_words =
      reinterpret_cast<const std::uint32_t*>(query + centre_constants_bytes(unit.group));
  // A ring of batches: the one being read, the next, and those on the way.
  constexpr std::int64_t kBatchesAhead = 4;
  constexpr std::int64_t kRing = kBatchesAhead + 1;
  CentreBatch ring[kRing];
  const std::int64_t batches = (page_end - page_begin + kIndexLanes - 1) / kIndexLanes;
  const auto count_of = [&](std::int64_t i) {
    return static_cast<int>(
        std::min<std::int64_t>(kIndexLanes, page_end - page_begin - i * kIndexLanes));
  };
  const auto fill = [&](std::int64_t i) HWY_ATTR {
    const std::int64_t first = page_begin + i * kIndexLanes;
    ring[i % kRing].fill(unit, count_of(i), [&](int r) { return first + r; });
  };
  for (std::int64_t i = 0; i < std::min(kBatchesAhead, batches); ++i) {
    fill(i);
    for (const std::byte* codes : ring[i].codes) prefetch_record(codes, record_bytes);
  }
  for (std::int64_t i = 0; i < batches; ++i) {
    if (i + kBatchesAhead < batches) fill(i + kBatchesAhead);
    const std::int64_t page = page_begin + i * kIndexLanes;
    const int count = count_of(i);
    const CentreBatch& batch = ring[i % kRing];
    const CentreBatch* next = i + 1 < batches ? &ring[(i + 1) % kRing] : nullptr;
    const CentreBatch* far =
        i + kBatchesAhead < batches ? &ring[(i + kBatchesAhead) % kRing] : nullptr;
    const CentreScales scales = centre_scales(batch);
    const std::uint32_t* words = first_words;
    const auto run = [&]<int kHeads>(int h0) HWY_ATTR {
      IndexVec dots[kMostRows][kHeads];
      batch_dots<kHeads>(head_dim, batch, scales, h0 == 0 ? next : nullptr, h0 == 0 ? far : nullptr,
                         rows_per_page, words, constants + h0, dots);
      IndexVec spread[kHeads];
      IndexVec mass[kHeads];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        spread[h] = hn::Mul(hn::Set(df, constants[h0 + h].spread), scales.variance);
      }
      if (sub && runs == kSubCentroids) {
        sub_centroid_masses<kSubCentroids, kHeads>(dots, runs, covered, spread, mass);
      } else if (sub) {
        sub_centroid_masses<0, kHeads>(dots, runs, covered, spread, mass);
      } else {
        for (int h = 0; h < kHeads; ++h) {
          const auto others = static_cast<float>(page_size - 1);
          mass[h] = centroid_mass<kHeads>(dots, h, others, spread[h]);
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        store_lanes(mass[h], count, masses + (h0 + h) * stride + page);
        if (dots_out != nullptr) {
          store_dots<kHeads>(dots, h, centres, count,
                             dots_out + ((h0 + h) * dot_stride + page) * centres);
        }
      }
      words += kHeads * centre_words(head_dim);
    };
    for_head_blocks(unit.group, run);
  }
}

// Up to kIndexLanes entries, -inf in the lanes past `count`.
HWY_INLINE IndexVec load_masses(const float* from, std::int64_t count) {
  const IndexF df;
  if (count >= kIndexLanes) return hn::LoadU(df, from);
  HWY_ALIGN float lanes[kIndexLanes];
  std::fill(lanes, lanes + kIndexLanes, -std::numeric_limits<float>::infinity());
  if (count > 0) std::memcpy(lanes, from, static_cast<std::size_t>(count) * sizeof(float));
  return hn::Load(df, lanes);
}

// log sum exp of a row. Sums run in 16 lanes and widen to double every 256 entries.
HWY_INLINE float row_log_sum(const float* row, std::int64_t pages) {
  const IndexF df;
  constexpr int kParts = 16 / kIndexLanes;
  constexpr std::int64_t kBlock = 256;
  IndexVec top = load_masses(row, pages);
  for (std::int64_t i = kIndexLanes; i < pages; i += kIndexLanes) {
    top = hn::Max(top, load_masses(row + i, pages - i));
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(df, top));
  const IndexVec shift = hn::Set(df, largest);
  double total = 0;
  for (std::int64_t begin = 0; begin < pages; begin += kBlock) {
    IndexVec sum[kParts];
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) sum[k] = hn::Zero(df);
    for (std::int64_t i = begin; i < std::min(begin + kBlock, pages); i += 16) {
#pragma GCC unroll 4
      for (int k = 0; k < kParts; ++k) {
        const std::int64_t at = i + k * kIndexLanes;
        sum[k] = hn::Add(sum[k], mass_exp(hn::Sub(load_masses(row + at, pages - at), shift)));
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) total += double{hn::GetLane(hn::SumOfLanes(df, sum[k]))};
  }
  return largest + static_cast<float>(std::log(total));
}

void combine_masses(const float* masses, std::int64_t stride, int group, std::int64_t pages,
                    float* norms, float* scores) {
  const IndexF df;
  if (pages == 0) return;
  for (int g = 0; g < group; ++g) norms[g] = row_log_sum(masses + g * stride, pages);
  const IndexVec heads = hn::Set(df, static_cast<float>(std::log(static_cast<double>(group))));
  for (std::int64_t i = 0; i < pages; i += kIndexLanes) {
    const auto share = [&](int g) HWY_ATTR {
      return hn::Sub(load_masses(masses + g * stride + i, pages - i), hn::Set(df, norms[g]));
    };
    IndexVec top = share(0);
    for (int g = 1; g < group; ++g) top = hn::Max(top, share(g));
    IndexVec sum = hn::Zero(df);
    for (int g = 0; g < group; ++g) sum = hn::Add(sum, mass_exp(hn::Sub(share(g), top)));
    const IndexVec score = hn::Sub(hn::Add(top, mass_log(sum)), heads);
    store_lanes(score, static_cast<int>(std::min<std::int64_t>(kIndexLanes, pages - i)),
                scores + i);
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_CENTROID_INL_H_
