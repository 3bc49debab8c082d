// Dots of the heads of a unit with the means of a batch of pages, and where those means are.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_CENTROID_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_CENTROID_INL_H_

#include "backend/cpu/kernels/centre_products-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

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

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_CENTROID_INL_H_
