// Masses of what is kept, and of what each candidate page loses.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_TAIL_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_TAIL_INL_H_

#include "backend/cpu/kernels/attend_math-inl.h"
#include "backend/cpu/kernels/select.h"
#include "backend/cpu/kernels/threshold-inl.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// Kept slots of a unit, one entry a vector of slots.
struct KeptBits {
  const MaskBits* vectors;

  HWY_INLINE hn::Mask<TagF> mask(std::int64_t vector) const {
    std::uint8_t bytes[8];
    std::memcpy(bytes, vectors + vector, sizeof(MaskBits));
    return hn::RebindMask(TagF(), hn::LoadMaskBits(TagI(), bytes));
  }
  [[nodiscard]] HWY_INLINE bool has(std::int64_t slot) const {
    return (vectors[slot / kLanesF] >> (slot % kLanesF) & 1) != 0;
  }
};

HWY_INLINE VecF positive_weights(const float* marked) {
  return hn::Max(hn::LoadU(TagF(), marked), hn::Zero(TagF()));
}

// kLanesF pages of one vector each: returns the sum of the kept weights, and the dropped ones of
// each page in `dropped`.
template <bool kTail>
HWY_INLINE VecF sum_block(const float* row, const KeptBits& kept, std::int64_t first,
                          VecF* dropped) {
  const TagF df;
  VecF sums[2] = {hn::Zero(df), hn::Zero(df)};
#pragma GCC unroll 16
  for (std::int64_t j = 0; j < kLanesF; ++j) {
    const VecF w = positive_weights(row + (first + j) * kLanesF);
    const auto in = kept.mask(first + j);
    sums[j % 2] = hn::Add(sums[j % 2], hn::IfThenElseZero(in, w));
    if constexpr (kTail) dropped[j] = hn::IfThenZeroElse(in, w);
  }
  return hn::Add(sums[0], sums[1]);
}

// Sum of a row's kept weights; kTail: the dropped ones of each page go to `tail`. Pages of whole
// vectors, kLanesF pages at a time, so that their lanes are summed together.
template <bool kTail>
HWY_INLINE double sum_whole_pages(const float* row, const KeptBits& kept, std::int64_t page_count,
                                  std::int64_t vectors_per_page, float* tail) {
  const TagF df;
  VecD low = hn::Zero(TagD());
  VecD high = hn::Zero(TagD());
  for (std::int64_t page = 0; page < page_count; page += kLanesF) {
    const std::int64_t count = std::min(page_count - page, kLanesF);
    VecF dropped[kLanesF];
    if (vectors_per_page == 1 && count == kLanesF) {
      add_wide(sum_block<kTail>(row, kept, page, dropped), low, high);
      if constexpr (kTail) hn::StoreU(sum_each(dropped), df, tail + page);
      continue;
    }
    for (std::int64_t j = 0; j < kLanesF; ++j) dropped[j] = hn::Zero(df);
    std::int64_t v = page * vectors_per_page;
    for (std::int64_t part = 0; part < vectors_per_page; part += 16 / kLanesF) {
      VecF sum = hn::Zero(df);
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t first = v + j * vectors_per_page + part;
        const std::int64_t end = std::min<std::int64_t>(16 / kLanesF, vectors_per_page - part);
        for (std::int64_t k = 0; k < end; ++k) {
          const VecF w = positive_weights(row + (first + k) * kLanesF);
          const auto in = kept.mask(first + k);
          sum = hn::Add(sum, hn::IfThenElseZero(in, w));
          if constexpr (kTail) dropped[j] = hn::Add(dropped[j], hn::IfThenZeroElse(in, w));
        }
      }
      add_wide(sum, low, high);
    }
    if constexpr (kTail) {
      const VecF sums = sum_each(dropped);
      if (count == kLanesF) {
        hn::StoreU(sums, df, tail + page);
      } else {
        alignas(64) float lanes[kRowPadding];
        hn::Store(sums, df, lanes);
        std::memcpy(tail + page, lanes, static_cast<std::size_t>(count) * sizeof(float));
      }
    }
  }
  return sum_lanes(hn::Add(low, high));
}

// The same for pages of any size.
HWY_INLINE double sum_pages(const float* row, const KeptBits& kept, std::int64_t page_count,
                            std::int64_t page_size, float* tail) {
  double mass = 0;
  std::int64_t slot = 0;
  for (std::int64_t page = 0; page < page_count; ++page) {
    double dropped = 0;
    for (const std::int64_t end = slot + page_size; slot < end; ++slot) {
      if (!(row[slot] > 0)) continue;
      (kept.has(slot) ? mass : dropped) += static_cast<double>(row[slot]);
    }
    if (tail != nullptr) tail[page] = static_cast<float>(dropped);
  }
  return mass;
}

// Writes masses and tail of every head.
HWY_INLINE void write_masses(const UnitePart& part, const KeptBits& kept) {
  for (std::int64_t g = 0; g < part.group; ++g) {
    const float* row = part.weights + g * part.stride;
    float* tail = part.tail_mass == nullptr ? nullptr : part.tail_mass + g * part.tail_stride;
    double mass = 0;
    if (part.page_size % kLanesF != 0) {
      mass = sum_pages(row, kept, part.page_count, part.page_size, tail);
    } else if (tail != nullptr) {
      mass = sum_whole_pages<true>(row, kept, part.page_count, part.page_size / kLanesF, tail);
    } else {
      mass = sum_whole_pages<false>(row, kept, part.page_count, part.page_size / kLanesF, nullptr);
    }
    const double total = part.heads[g].total;
    part.head_mass[g] = total > 0 ? static_cast<float>(std::min(1.0, mass / total)) : 0.0F;
    if (tail != nullptr) part.tail_shift[g] = part.heads[g].maximum;
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_TAIL_INL_H_
