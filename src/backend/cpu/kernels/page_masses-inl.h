// Log masses of pages from the products of queries with their means, and page scores from those.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_PAGE_MASSES_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_PAGE_MASSES_INL_H_

#include "backend/cpu/kernels/centroid-inl.h"
#include "backend/cpu/kernels/mass_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

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

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_PAGE_MASSES_INL_H_
