// Quest scores: bounds of a page's q.k from its summary, blocks of pages against blocks of heads.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_QUEST_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_QUEST_INL_H_

#include <array>

#include "backend/cpu/kernels/index_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

inline const float* quest_head(const IndexUnit& unit, int head) {
  return unit.q + static_cast<std::int64_t>(std::min(head, unit.group - 1)) * unit.kv.head_dim;
}

// --- kQuestBf16 -------------------------------------------------------------------------------
#if TWILIGHT_HAS_BF16_DOT

// Per head block and 32 channels: masks of the channels with q >= 0 (four heads), then for each
// head the query as two bf16 parts, hi + lo, which leaves 2^-16 of it. One blend picks max or min
// per channel, so the two parts cost as many dot products as one part would against both vectors.
constexpr int kQuestChannels = 32;
constexpr std::int64_t kQuestChunkBytes = 64 + kBlockHeads * 128;

inline void prepare_quest_bf16(const IndexUnit& unit, std::byte* query) {
  const int head_dim = unit.kv.head_dim;
  for (int block = 0; block < head_blocks(unit.group); ++block) {
    for (int d0 = 0; d0 < head_dim; d0 += kQuestChannels, query += kQuestChunkBytes) {
      std::memset(query, 0, kQuestChunkBytes);
      for (int h = 0; h < kBlockHeads; ++h) {
        const float* q = quest_head(unit, block * kBlockHeads + h) + d0;
        std::uint32_t mask = 0;
        std::uint16_t parts[2][kQuestChannels] = {};
        for (int i = 0; i < std::min(kQuestChannels, head_dim - d0); ++i) {
          if (q[i] >= 0) mask |= std::uint32_t{1} << i;
          parts[0][i] = f32_to_bf16(q[i]);
          parts[1][i] = f32_to_bf16(q[i] - bf16_to_f32(parts[0][i]));
        }
        std::memcpy(query + h * 4, &mask, 4);
        std::memcpy(query + 64 + h * 128, parts, 128);
      }
    }
  }
}

HWY_INLINE IndexVec quest_bf16_block(std::int64_t head_dim, const std::byte* const* records,
                                     const std::byte* query) {
  const IndexF df;
  __m512 acc[kIndexLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kIndexLanes; ++i) acc[i] = hn::Zero(df).raw;
  for (std::int64_t d = 0; d < head_dim; d += kQuestChannels, query += kQuestChunkBytes) {
    const __mmask32 inside = head_dim - d < kQuestChannels ? 0xffffU : 0xffffffffU;
    __m512i lo[kBlockRows];
    __m512i hi[kBlockRows];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      lo[r] = _mm512_maskz_loadu_epi16(inside, records[r] + 2 * d);
      hi[r] = _mm512_maskz_loadu_epi16(inside, records[r] + 2 * (head_dim + d));
    }
#pragma GCC unroll 4
    for (int h = 0; h < kBlockHeads; ++h) {
      std::uint32_t mask;
      std::memcpy(&mask, query + h * 4, 4);
      const auto q0 = (__m512bh)_mm512_load_si512(query + 64 + h * 128);
      const auto q1 = (__m512bh)_mm512_load_si512(query + 64 + h * 128 + 64);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) {
        const auto bound = (__m512bh)_mm512_mask_blend_epi16(mask, lo[r], hi[r]);
        __m512& sum = acc[h * kBlockRows + r];
        sum = _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, bound, q1), bound, q0);
      }
    }
  }
  IndexVec sums[kIndexLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kIndexLanes; ++i) sums[i] = IndexVec{acc[i]};
  return sum_lanes_of_each(sums);
}

inline std::int64_t quest_bf16_query_bytes(int head_dim) {
  return (head_dim + kQuestChannels - 1) / kQuestChannels * kQuestChunkBytes;
}

#else

// Per head block and vector of channels, for each head: max(q, 0), then min(q, 0).
inline void prepare_quest_bf16(const IndexUnit& unit, std::byte* query) {
  auto* out = reinterpret_cast<float*>(query);
  for (int block = 0; block < head_blocks(unit.group); ++block) {
    for (int d0 = 0; d0 < unit.kv.head_dim; d0 += kIndexLanes) {
      for (int h = 0; h < kBlockHeads; ++h, out += 2 * kIndexLanes) {
        const float* q = quest_head(unit, block * kBlockHeads + h) + d0;
        for (int i = 0; i < kIndexLanes; ++i) {
          out[i] = std::max(q[i], 0.0F);
          out[kIndexLanes + i] = std::min(q[i], 0.0F);
        }
      }
    }
  }
}

HWY_INLINE IndexVec quest_bf16_block(std::int64_t head_dim, const std::byte* const* records,
                                     const std::byte* query) {
  const IndexF df;
  const auto* q = reinterpret_cast<const float*>(query);
  IndexVec acc[kIndexLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kIndexLanes; ++i) acc[i] = hn::Zero(df);
  for (std::int64_t d = 0; d < head_dim; d += kIndexLanes) {
    IndexVec lo[kBlockRows];
    IndexVec hi[kBlockRows];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      lo[r] = load_row<DType::kBf16>(records[r], d);
      hi[r] = load_row<DType::kBf16>(records[r], head_dim + d);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kBlockHeads; ++h, q += 2 * kIndexLanes) {
      const IndexVec positive = hn::Load(df, q);
      const IndexVec negative = hn::Load(df, q + kIndexLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) {
        IndexVec& sum = acc[h * kBlockRows + r];
        sum = hn::MulAdd(lo[r], negative, hn::MulAdd(hi[r], positive, sum));
      }
    }
  }
  return sum_lanes_of_each(acc);
}

inline std::int64_t quest_bf16_query_bytes(int head_dim) {
  return std::int64_t{kBlockHeads} * head_dim * 8;
}

#endif  // TWILIGHT_HAS_BF16_DOT

// --- kQuest4 ----------------------------------------------------------------------------------
//
// With q+ = max(q, 0), q- = min(q, 0) and queries rounded to q ~= step * qi, |qi| <= 127:
//   score = sum q+ (s_max c_max + z_max) + sum q- (s_min c_min + z_min)
//        ~= step (s_max sum qi+ c_max + s_min sum qi- c_min)
//         + z_max A+ + s_max B+ + z_min A- + s_min B-,
//   A = sum q (exact), B = 7.5 (A - step sum qi),
// so a query's rounding error multiplies codes centred on 7.5 only:
//   |error| <= max|q| / 254 * 7.5 * (n+ s_max + n- s_min), n+- = channels of either sign.
// Where the 4-bit rounding makes a decoded min exceed its max, this takes the vector that the sign
// of q names, which is what the score of the exact vectors would do.

using IndexBytes = hn::Vec<hn::Repartition<std::uint8_t, IndexF>>;
using IndexI32 = hn::Vec<hn::RebindToSigned<IndexF>>;
constexpr int kVectorBytes = 4 * kIndexLanes;

// acc + the sums of four products u * s in each 32-bit lane; u <= 15, so no sum of two saturates.
HWY_INLINE IndexI32 dot_nibbles(IndexI32 acc, IndexBytes u, IndexBytes s) {
#if TWILIGHT_HAS_VNNI
  return IndexI32{_mm512_dpbusd_epi32(acc.raw, u.raw, s.raw)};
#elif HWY_TARGET == HWY_AVX3
  const __m512i pairs = _mm512_maddubs_epi16(u.raw, s.raw);
  return IndexI32{_mm512_add_epi32(acc.raw, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif HWY_TARGET == HWY_AVX2
  const __m256i pairs = _mm256_maddubs_epi16(u.raw, s.raw);
  return IndexI32{_mm256_add_epi32(acc.raw, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#else
  const hn::RebindToSigned<IndexF> di32;
  const auto codes = hn::BitCast(di32, u);
  const auto query = hn::BitCast(di32, s);
  const auto low = hn::Set(di32, 0xff);
  const auto product = [](auto a, auto b) HWY_ATTR { return hn::Mul(a, b); };
  acc = hn::Add(acc, product(hn::And(codes, low), hn::ShiftRight<24>(hn::ShiftLeft<24>(query))));
  acc = hn::Add(acc, product(hn::And(hn::ShiftRight<8>(codes), low),
                             hn::ShiftRight<24>(hn::ShiftLeft<16>(query))));
  acc = hn::Add(acc, product(hn::And(hn::ShiftRight<16>(codes), low),
                             hn::ShiftRight<24>(hn::ShiftLeft<8>(query))));
  return hn::Add(acc, product(hn::And(hn::ShiftRight<24>(codes), low), hn::ShiftRight<24>(query)));
#endif
}

// The first `count` bytes at `from`, then zeros.
HWY_INLINE IndexBytes load_bytes(const std::byte* from, std::int64_t count) {
  const hn::Repartition<std::uint8_t, IndexF> du8;
  if (count >= kVectorBytes) return hn::LoadU(du8, reinterpret_cast<const std::uint8_t*>(from));
  HWY_ALIGN std::uint8_t padded[kVectorBytes] = {};
  std::memcpy(padded, from, static_cast<std::size_t>(count));
  return hn::Load(du8, padded);
}

// Per head block: five vectors in lane order (step, A+, B+, A-, B-), then the rounded queries: side
// (min, max), chunk of bytes, half (low, high nibbles), head.
constexpr int kQuest4Constants = 5;

inline std::int64_t quest4_query_bytes(int head_dim) {
  const std::int64_t chunks = (head_dim / 2 + kVectorBytes - 1) / kVectorBytes;
  return kVectorBytes * (kQuest4Constants + 2 * chunks * 2 * kBlockHeads);
}

inline void prepare_quest4(const IndexUnit& unit, std::byte* query) {
  const int head_dim = unit.kv.head_dim;
  const int half = head_dim / 2;
  const std::int64_t block_bytes = quest4_query_bytes(head_dim);
  for (int block = 0; block < head_blocks(unit.group); ++block, query += block_bytes) {
    std::memset(query, 0, static_cast<std::size_t>(block_bytes));
    auto* constants = reinterpret_cast<float*>(query);
    auto* rounded = reinterpret_cast<std::int8_t*>(query) + kQuest4Constants * kVectorBytes;
    const int chunks = (half + kVectorBytes - 1) / kVectorBytes;
    for (int h = 0; h < kBlockHeads; ++h) {
      const float* q = quest_head(unit, block * kBlockHeads + h);
      float largest = 0;
      for (int d = 0; d < head_dim; ++d) largest = std::max(largest, std::fabs(q[d]));
      const float step = largest / 127.0F;
      const float inverse = step > 0 ? 1.0F / step : 0.0F;
      double sum[2] = {};  // of min(q, 0), max(q, 0)
      std::int64_t sum_int[2] = {};
      for (int d = 0; d < head_dim; ++d) {
        const int side = q[d] >= 0 ? 1 : 0;
        const auto qi =
            static_cast<int>(std::nearbyint(std::clamp(q[d] * inverse, -127.0F, 127.0F)));
        sum[side] += q[d];
        sum_int[side] += qi;
        const int byte = d % half;
        rounded[(((side * chunks + byte / kVectorBytes) * 2 + d / half) * kBlockHeads + h) *
                    kVectorBytes +
                byte % kVectorBytes] = static_cast<std::int8_t>(qi);
      }
      for (int r = 0; r < kBlockRows; ++r) {
        float* lane = constants + h * kBlockRows + r;
        lane[0] = step;
        for (int side = 0; side < 2; ++side) {
          float* ab = lane + (side == 1 ? 1 : 3) * kIndexLanes;
          ab[0] = static_cast<float>(sum[side]);
          ab[kIndexLanes] = static_cast<float>(
              7.5 * (sum[side] - static_cast<double>(step) * static_cast<double>(sum_int[side])));
        }
      }
    }
  }
}

// Scales and zeros of kBlockRows summaries in lane order.
struct Quest4Scales {
  IndexVec min_scale, min_zero, max_scale, max_zero;
};

HWY_INLINE Quest4Scales quest4_scales(std::int64_t head_dim, const std::byte* const* records) {
  const IndexF df;
  // Four halves a record fill one vector: lane row * 4 + parameter.
  HWY_ALIGN std::byte halves[2 * kIndexLanes];
#pragma GCC unroll 4
  for (int r = 0; r < kBlockRows; ++r) std::memcpy(halves + 8 * r, records[r] + head_dim, 8);
  const IndexVec parameters = load_row<DType::kF16>(halves, 0);
  HWY_ALIGN static constexpr auto kLanesOf = [] {
    std::array<std::array<std::int32_t, kIndexLanes>, 4> lanes{};
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < kIndexLanes; ++lane) lanes[i][lane] = lane % kBlockRows * 4 + i;
    }
    return lanes;
  }();
  const auto pick = [&](int i) HWY_ATTR {
    return hn::TableLookupLanes(parameters, hn::SetTableIndices(df, kLanesOf[i].data()));
  };
  return {pick(0), pick(1), pick(2), pick(3)};
}

// Lane head * kBlockRows + row: sum of codes * qi of one side (0 min, 1 max).
HWY_INLINE IndexVec quest4_dots(std::int64_t head_dim, int side, const std::byte* const* records,
                                const std::byte* rounded) {
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const hn::Repartition<std::uint8_t, IndexF> du8;
  const hn::Repartition<std::uint16_t, IndexF> du16;
  const std::int64_t half = head_dim / 2;
  const auto low_nibble = hn::Set(du8, 15);
  const auto* q = reinterpret_cast<const std::uint8_t*>(rounded);
  IndexI32 acc[kIndexLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kIndexLanes; ++i) acc[i] = hn::Zero(di32);
  for (std::int64_t b = 0; b < half; b += kVectorBytes) {
    IndexBytes lo[kBlockRows];
    IndexBytes hi[kBlockRows];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      const IndexBytes codes = load_bytes(records[r] + side * half + b, half - b);
      lo[r] = hn::And(codes, low_nibble);
      hi[r] = hn::And(hn::BitCast(du8, hn::ShiftRight<4>(hn::BitCast(du16, codes))), low_nibble);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kBlockHeads; ++h, q += kVectorBytes) {
      const IndexBytes q_lo = hn::Load(du8, q);
      const IndexBytes q_hi = hn::Load(du8, q + kBlockHeads * kVectorBytes);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) {
        IndexI32& sum = acc[h * kBlockRows + r];
        sum = dot_nibbles(dot_nibbles(sum, lo[r], q_lo), hi[r], q_hi);
      }
    }
    q += kBlockHeads * kVectorBytes;
  }
  // A lane's sum stays below 2^24, so the conversion is exact.
  IndexVec sums[kIndexLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kIndexLanes; ++i) sums[i] = hn::ConvertTo(df, acc[i]);
  return sum_lanes_of_each(sums);
}

HWY_INLINE IndexVec quest4_block(std::int64_t head_dim, const std::byte* const* records,
                                 const Quest4Scales& s, const std::byte* query) {
  const IndexF df;
  const auto* constants = reinterpret_cast<const float*>(query);
  const std::byte* rounded = query + kQuest4Constants * kVectorBytes;
  const std::int64_t side_bytes =
      (quest4_query_bytes(static_cast<int>(head_dim)) - kQuest4Constants * kVectorBytes) / 2;
  const IndexVec dot_min = quest4_dots(head_dim, 0, records, rounded);
  const IndexVec dot_max = quest4_dots(head_dim, 1, records, rounded + side_bytes);
  const auto constant = [&](int i) HWY_ATTR { return hn::Load(df, constants + i * kIndexLanes); };
  IndexVec sum =
      hn::Mul(constant(0), hn::MulAdd(s.max_scale, dot_max, hn::Mul(s.min_scale, dot_min)));
  sum = hn::MulAdd(s.max_zero, constant(1), sum);
  sum = hn::MulAdd(s.max_scale, constant(2), sum);
  sum = hn::MulAdd(s.min_zero, constant(3), sum);
  return hn::MulAdd(s.min_scale, constant(4), sum);
}

// --- both -------------------------------------------------------------------------------------

template <SummaryKind kKind>
inline void score_page_range(const IndexUnit& unit, const std::byte* query, std::int64_t begin,
                             std::int64_t end, float* scores) {
  const IndexF df;
  const std::int64_t head_dim = unit.kv.head_dim;
  const std::int64_t record_bytes = summary_record_bytes(kKind, unit.kv.head_dim);
  const int blocks = head_blocks(unit.group);
  const auto record = [&](std::int64_t page) {
    return unit.index.summary(unit.kv.page_of(unit.seq, page), unit.kv_head);
  };
  const std::int64_t ahead = std::max<std::int64_t>(records_ahead(record_bytes), kBlockRows);
  for (std::int64_t p = begin; p < std::min(begin + ahead, end); ++p) {
    prefetch_record(record(p), record_bytes);
  }
  for (std::int64_t p = begin; p < end; p += kBlockRows) {
    const std::byte* records[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      records[r] = record(std::min(p + r, end - 1));
      if (p + r + ahead < end) prefetch_record(record(p + r + ahead), record_bytes);
    }
    Quest4Scales scales;
    std::int64_t query_bytes;
    if constexpr (kKind == SummaryKind::kQuest4) {
      scales = quest4_scales(head_dim, records);
      query_bytes = quest4_query_bytes(unit.kv.head_dim);
    } else {
      query_bytes = quest_bf16_query_bytes(unit.kv.head_dim);
    }
    IndexVec best = hn::Zero(df);
    for (int block = 0; block < blocks; ++block) {
      IndexVec sums;
      if constexpr (kKind == SummaryKind::kQuest4) {
        sums = quest4_block(head_dim, records, scales, query + block * query_bytes);
      } else {
        sums = quest_bf16_block(head_dim, records, query + block * query_bytes);
      }
      best = block == 0 ? sums : hn::Max(best, sums);
    }
    HWY_ALIGN float lanes[kIndexLanes];
    hn::Store(best, df, lanes);
    const auto count = static_cast<int>(std::min<std::int64_t>(kBlockRows, end - p));
    for (int r = 0; r < count; ++r) {
      const float pair01 = std::max(lanes[r], lanes[kBlockRows + r]);
      const float pair23 = std::max(lanes[2 * kBlockRows + r], lanes[3 * kBlockRows + r]);
      scores[p + r] = unit.scale * std::max(pair01, pair23);
    }
  }
}

void prepare_scores(const IndexUnit& unit, std::byte* query) {
  if (unit.index.format.summary == SummaryKind::kQuest4) {
    prepare_quest4(unit, query);
  } else {
    prepare_quest_bf16(unit, query);
  }
}

void score_pages(const IndexUnit& unit, const std::byte* query, std::int64_t page_begin,
                 std::int64_t page_end, float* scores) {
  if (unit.index.format.summary == SummaryKind::kQuest4) {
    score_page_range<SummaryKind::kQuest4>(unit, query, page_begin, page_end, scores);
  } else {
    score_page_range<SummaryKind::kQuestBf16>(unit, query, page_begin, page_end, scores);
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_QUEST_INL_H_
