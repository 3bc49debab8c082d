// How many of the best pages reach a share of the mass.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_SELECT_MASS_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_SELECT_MASS_INL_H_

#include "backend/cpu/kernels/select.h"
#include "backend/cpu/simd.h"

#include "backend/cpu/kernels/threshold-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// exp(x) for x <= 0 within a few units in the last place, exactly 1 at 0; 0 below -700 and for NaN.
// Taylor's series on |r| <= ln(2) / 2: the next term is below 2^-52.
HWY_INLINE VecD exp_double(VecD x) {
  const TagD dd;
  const hn::RebindToSigned<TagD> di;
  const VecD lowest = hn::Set(dd, -700.0);
  const auto weighs = hn::Gt(x, lowest);
  const VecD safe = hn::IfThenElse(weighs, x, lowest);
  const VecD rounder = hn::Set(dd, 0x1.8p52);
  const VecD shifted = hn::MulAdd(safe, hn::Set(dd, 1.4426950408889634), rounder);
  const VecD n = hn::Sub(shifted, rounder);
  VecD r = hn::NegMulAdd(n, hn::Set(dd, 0x1.62e42fefa38p-1), safe);
  r = hn::NegMulAdd(n, hn::Set(dd, 0x1.ef35793c7673p-45), r);
  double factorial = 479001600.0;  // 12!
  VecD y = hn::Set(dd, 1.0 / factorial);
  for (int k = 12; k >= 1; --k) {
    factorial /= k;
    y = hn::MulAdd(y, r, hn::Set(dd, 1.0 / factorial));
  }
  const auto power = hn::Add(hn::BitCast(di, y), hn::ShiftLeft<52>(hn::BitCast(di, shifted)));
  return hn::IfThenElseZero(weighs, hn::BitCast(dd, power));
}

// A vector of scores from i on; NaN past the end.
HWY_INLINE VecF load_scores(const MassPart& part, std::int64_t i) {
  const TagF df;
  if (i + kLanesF <= part.pages) return hn::LoadU(df, part.scores + i);
  alignas(64) float lanes[kRowPadding];
  for (std::int64_t lane = 0; lane < kLanesF; ++lane) {
    lanes[lane] =
        i + lane < part.pages ? part.scores[i + lane] : std::numeric_limits<float>::quiet_NaN();
  }
  return hn::Load(df, lanes);
}

// Mass and count of the keys above `key` and of those equal to it, and the keys next to it. Rows
// are whole vectors, closed by kLowestKey.
struct Around {
  Tally above;
  Tally equal;
  std::int32_t next_above = std::numeric_limits<std::int32_t>::max();
  std::int32_t next_below = kLowestKey;
};
HWY_INLINE Around look_around(const std::int32_t* keys, const double* masses, std::int64_t size,
                              std::int32_t key) {
  const TagI di;
  const TagD dd;
  const hn::RebindToSigned<TagD> dl;
  const hn::Half<TagI> half;
  const VecI here = hn::Set(di, key);
  VecD above = hn::Zero(dd);
  VecD equal = hn::Zero(dd);
  VecI next_above = hn::Set(di, std::numeric_limits<std::int32_t>::max());
  VecI next_below = hn::Set(di, kLowestKey);
  Around at;
  for (std::int64_t i = 0; i < size; i += kLanesF) {
    const VecI k = hn::LoadU(di, keys + i);
    const auto over = hn::Gt(k, here);
    const auto same = hn::Eq(k, here);
    at.above.count += static_cast<std::int64_t>(hn::CountTrue(di, over));
    at.equal.count += static_cast<std::int64_t>(hn::CountTrue(di, same));
    next_above = hn::Min(next_above, hn::IfThenElse(over, k, next_above));
    next_below = hn::Max(next_below, hn::IfThenElse(hn::Lt(k, here), k, next_below));
    const auto add = [&](VecD& sum, hn::Mask<TagI> in) HWY_ATTR {
      const VecI wide = hn::VecFromMask(di, in);
      const auto low = hn::BitCast(dd, hn::PromoteTo(dl, hn::LowerHalf(half, wide)));
      const auto high = hn::BitCast(dd, hn::PromoteTo(dl, hn::UpperHalf(half, wide)));
      sum = hn::Add(sum, hn::And(low, hn::LoadU(dd, masses + i)));
      sum = hn::Add(sum, hn::And(high, hn::LoadU(dd, masses + i + kLanesD)));
    };
    add(above, over);
    add(equal, same);
  }
  at.above.mass = sum_lanes(above);
  at.equal.mass = sum_lanes(equal);
  at.next_above = hn::GetLane(hn::MinOfLanes(di, next_above));
  at.next_below = hn::GetLane(hn::MaxOfLanes(di, next_below));
  return at;
}

// The search goes by masses rounded to f32, whose keys are in the order of the scores; the last
// step decides in double.
std::int64_t count_by_mass(const MassPart& part, std::int32_t* scratch) {
  const TagF df;
  const TagI di;
  const TagD dd;
  const hn::Half<TagF> half;
  const std::int64_t size = part.end - part.begin;
  if (size <= 0) return 0;
  VecF tops = hn::Set(df, -std::numeric_limits<float>::infinity());
  for (std::int64_t i = 0; i < part.pages; i += kLanesF) {
    const VecF scores = load_scores(part, i);
    tops = hn::IfThenElse(hn::Gt(scores, tops), scores, tops);
  }
  const float top = max_of_lanes(tops);
  if (std::isinf(top)) return 0;  // no page has a mass

  const std::int64_t stride = padded_row(part.pages) + kRowPadding;
  auto* masses = reinterpret_cast<double*>(scratch);
  std::int32_t* row = scratch + 2 * stride;
  std::int32_t* list = row + stride;
  const VecD shift = hn::Set(dd, static_cast<double>(top));
  VecD all = hn::Zero(dd);
  for (std::int64_t i = 0; i < part.pages; i += kLanesF) {
    const VecF scores = load_scores(part, i);
    const VecD low = exp_double(hn::Sub(hn::PromoteTo(dd, hn::LowerHalf(half, scores)), shift));
    const VecD high = exp_double(hn::Sub(hn::PromoteTo(dd, hn::UpperHalf(half, scores)), shift));
    hn::StoreU(low, dd, masses + i);
    hn::StoreU(high, dd, masses + i + kLanesD);
    all = hn::Add(all, hn::Add(low, high));
    const VecF both = hn::Combine(df, hn::DemoteTo(half, high), hn::DemoteTo(half, low));
    hn::StoreU(hn::BitCast(di, both), di, row + i);
  }
  double missing = part.mass * sum_lanes(all);
  for (std::int64_t i = 0; i < part.begin; ++i) missing -= masses[i];
  for (std::int64_t i = part.end; i < part.pages; ++i) missing -= masses[i];
  if (!(missing > 0)) return 0;

  std::int32_t* keys = row + part.begin;
  masses += part.begin;
  const std::int64_t entries = padded_row(size);
  for (std::int64_t i = size; i < entries; ++i) keys[i] = kLowestKey;
  const std::int32_t one = 0x3f800000;
  const std::int64_t positive = narrow_to<true>(keys, entries, 1, one, list);
  std::int32_t key = find_top_set<true>(keys, entries, 1, one, {}, missing, list, positive).key;
  for (;;) {
    const Around at = look_around(keys, masses, size, key);
    if (at.above.mass >= missing) {
      key = at.next_above;
    } else if (at.above.mass + at.equal.mass < missing) {
      if (at.next_below == kLowestKey) return size;  // rounding left all of them short
      key = at.next_below;
    } else {
      const double each = at.equal.mass / static_cast<double>(at.equal.count);
      std::int64_t count = at.above.count;
      double reached = at.above.mass;
      for (; reached < missing && count < size; ++count) reached += each;
      return count;
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_SELECT_MASS_INL_H_
