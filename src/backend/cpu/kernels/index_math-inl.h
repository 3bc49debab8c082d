// Vector helpers of the index kernels: row loads and blocks of dot products that share their loads.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_INDEX_MATH_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_INDEX_MATH_INL_H_

#include "backend/cpu/kernels/index.h"
#include "backend/cpu/simd.h"
#include "core/float16.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using IndexF = hn::ScalableTag<float>;
using IndexVec = hn::Vec<IndexF>;
constexpr int kIndexLanes = static_cast<int>(sizeof(IndexVec) / sizeof(float));

// Dot products come in blocks of kBlockHeads query heads by kBlockRows rows (pages or tokens), one
// accumulator each, so that one vector holds the block's sums: lane head * kBlockRows + row. Heads
// past the group's end repeat its last one.
constexpr int kBlockHeads = 4;
constexpr int kBlockRows = kIndexLanes / kBlockHeads;

constexpr int head_blocks(int group) { return (group + kBlockHeads - 1) / kBlockHeads; }

// Lane i of each 128-bit block: the sum of that block of a[i].
HWY_INLINE IndexVec block_sums(const IndexVec* a) {
  const IndexF df;
  const hn::Repartition<double, IndexF> dd;
  const IndexVec s01 =
      hn::Add(hn::InterleaveLower(df, a[0], a[1]), hn::InterleaveUpper(df, a[0], a[1]));
  const IndexVec s23 =
      hn::Add(hn::InterleaveLower(df, a[2], a[3]), hn::InterleaveUpper(df, a[2], a[3]));
  const auto d01 = hn::BitCast(dd, s01);
  const auto d23 = hn::BitCast(dd, s23);
  return hn::Add(hn::BitCast(df, hn::InterleaveLower(dd, d01, d23)),
                 hn::BitCast(df, hn::InterleaveUpper(dd, d01, d23)));
}

// Lane i: the sum of the lanes of a[i], i < kIndexLanes, in the same order for every i. Three
// instructions an accumulator.
template <int kLanes = kIndexLanes>
HWY_INLINE IndexVec sum_lanes_of_each(const IndexVec* a) {
  const IndexF df;
  if constexpr (kLanes == 4) {
    return block_sums(a);
  } else if constexpr (kLanes == 8) {
    const IndexVec s0 = block_sums(a);
    const IndexVec s1 = block_sums(a + 4);
    return hn::Add(hn::ConcatLowerLower(df, s1, s0), hn::ConcatUpperUpper(df, s1, s0));
  } else {
    static_assert(kLanes == 16);
    const IndexVec s0 = block_sums(a);
    const IndexVec s2 = block_sums(a + 8);
    // Blocks (0, 0', 2, 2') and (1, 1', 3, 3'): halves of the sums of quads 0 to 3.
    const IndexVec even =
        hn::Add(hn::ConcatLowerLower(df, s2, s0), hn::ConcatUpperUpper(df, s2, s0));
    const IndexVec s1 = block_sums(a + 4);
    const IndexVec s3 = block_sums(a + 12);
    const IndexVec odd =
        hn::Add(hn::ConcatLowerLower(df, s3, s1), hn::ConcatUpperUpper(df, s3, s1));
    const IndexVec first = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even);
    const IndexVec second = hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even));
    return hn::Add(first, second);
  }
}

// Channels [d, d + kIndexLanes) of a cache row as f32.
template <DType kType>
HWY_INLINE IndexVec load_row(const std::byte* row, std::int64_t d) {
  const IndexF df;
  if constexpr (kType == DType::kF32) {
    return hn::LoadU(df, reinterpret_cast<const float*>(row) + d);
  } else if constexpr (kType == DType::kBf16) {
    const hn::RebindToUnsigned<IndexF> du32;
    const hn::Rebind<std::uint16_t, IndexF> du16;
    const auto bits = hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(row) + d);
    return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
  } else {
#if HWY_TARGET == HWY_EMU128
    const auto* half = reinterpret_cast<const std::uint16_t*>(row) + d;
    float wide[kIndexLanes];
    for (int i = 0; i < kIndexLanes; ++i) wide[i] = f16_to_f32(half[i]);
    return hn::LoadU(df, wide);
#else
    const hn::Rebind<hwy::float16_t, IndexF> df16;
    return hn::PromoteTo(df, hn::LoadU(df16, reinterpret_cast<const hwy::float16_t*>(row) + d));
#endif
  }
}

// Records lie wherever the page pool put them, which no hardware prefetcher follows, so the kernels
// fetch them kBytesAhead ahead, into the second level: with a first-level hint the score of
// scattered pages ran at 10 GB/s on Zen 4 and with this one at 23 GB/s.
constexpr std::int64_t kBytesAhead = 16384;
constexpr std::int64_t records_ahead(std::int64_t record_bytes) {
  return std::clamp<std::int64_t>(kBytesAhead / record_bytes, 1, 64);
}
HWY_INLINE void prefetch_line(const std::byte* line) { __builtin_prefetch(line, 0, 2); }
HWY_INLINE void prefetch_near_line(const std::byte* line) { __builtin_prefetch(line, 0, 3); }
HWY_INLINE void prefetch_record(const std::byte* record, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) prefetch_line(record + i);
}

// Exact products of kBlockHeads queries with kBlockRows rows: lane head * kBlockRows + row.
template <DType kType>
HWY_INLINE IndexVec dot_rows(std::int64_t head_dim, const std::byte* const* rows,
                             const float* const* queries) {
  const IndexF df;
  IndexVec acc[kIndexLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kIndexLanes; ++i) acc[i] = hn::Zero(df);
  for (std::int64_t d = 0; d < head_dim; d += kIndexLanes) {
    IndexVec row[kBlockRows];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) row[r] = load_row<kType>(rows[r], d);
#pragma GCC unroll 4
    for (int h = 0; h < kBlockHeads; ++h) {
      const IndexVec q = hn::LoadU(df, queries[h] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) {
        acc[h * kBlockRows + r] = hn::MulAdd(row[r], q, acc[h * kBlockRows + r]);
      }
    }
  }
  return sum_lanes_of_each(acc);
}

// Exact scaled scores of `count` rows of one page from `first` on, rows `row_bytes` apart:
// scores[head * stride + row]. The same rows of the page at `next` are fetched meanwhile.
template <DType kType>
HWY_INLINE void score_rows(const IndexUnit& unit, const std::byte* first, const std::byte* next,
                           std::int64_t row_bytes, std::int64_t count, float* scores,
                           std::int64_t stride) {
  const IndexF df;
  const std::int64_t head_dim = unit.kv.head_dim;
  const IndexVec scale = hn::Set(df, unit.scale);
  for (std::int64_t r0 = 0; r0 < count; r0 += kBlockRows) {
    const std::byte* rows[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      const std::int64_t offset = std::min(r0 + r, count - 1) * row_bytes;
      rows[r] = first + offset;
      prefetch_record(next + offset, head_dim * dtype_bytes(kType));
    }
    const auto valid = static_cast<std::size_t>(std::min<std::int64_t>(kBlockRows, count - r0));
    for (int h0 = 0; h0 < unit.group; h0 += kBlockHeads) {
      const float* queries[kBlockHeads];
      for (int h = 0; h < kBlockHeads; ++h) {
        queries[h] = unit.q + std::min(h0 + h, unit.group - 1) * head_dim;
      }
      HWY_ALIGN float block[kIndexLanes];
      hn::Store(hn::Mul(scale, dot_rows<kType>(head_dim, rows, queries)), df, block);
      const int heads = std::min(kBlockHeads, unit.group - h0);
      for (int h = 0; h < heads; ++h) {
        std::memcpy(scores + (h0 + h) * stride + r0, block + h * kBlockRows, valid * sizeof(float));
      }
    }
  }
}

// `count` slots of one page from `slot` on, of any dtype; `next_page` is fetched meanwhile.
inline void score_page_rows(const IndexUnit& unit, std::int64_t page, std::int64_t next_page,
                            std::int64_t slot, std::int64_t count, float* scores,
                            std::int64_t stride) {
  const std::int64_t row_bytes = unit.kv.k.token_stride * dtype_bytes(unit.kv.dtype);
  const std::byte* first = unit.kv.k_rows(page, unit.kv_head) + slot * row_bytes;
  const std::byte* next = unit.kv.k_rows(next_page, unit.kv_head) + slot * row_bytes;
  switch (unit.kv.dtype) {
    case DType::kF32:
      return score_rows<DType::kF32>(unit, first, next, row_bytes, count, scores, stride);
    case DType::kF16:
      return score_rows<DType::kF16>(unit, first, next, row_bytes, count, scores, stride);
    case DType::kBf16:
      return score_rows<DType::kBf16>(unit, first, next, row_bytes, count, scores, stride);
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_INDEX_MATH_INL_H_
