// The top-p set of a group's mean weights.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_GROUP_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_GROUP_INL_H_

#include "backend/cpu/kernels/prune-inl.h"
#include "backend/cpu/kernels/select.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// Means below this are 0 in the row: no threshold of mass is so low (p is at least 2^-24 short of
// 1, and rows are far shorter than 2^70). Ranks are made for them where min_tokens asks.
constexpr float kLeastMean = 0x1p-100F;

// What a head's weight counts in the mean: 1 / (G total).
HWY_INLINE float head_share(const UnitePart& part, std::int64_t g) {
  const double total = part.heads[g].total;
  return total > 0 ? static_cast<float>(1.0 / (total * part.group)) : 0.0F;
}

// Whether any head's row has a token in each slot of a vector.
HWY_INLINE hn::Mask<TagF> present_in(const UnitePart& part, std::int64_t i) {
  const TagF df;
  const VecF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  auto present = hn::Gt(hn::LoadU(df, part.weights + i), lowest);
  for (std::int64_t g = 1; g < part.group; ++g) {
    present = hn::Or(present, hn::Gt(hn::LoadU(df, part.weights + g * part.stride + i), lowest));
  }
  return present;
}

// Writes mean_g w_g / total_g, 0 where it is below kLeastMean and -inf in slots without a token,
// and lists the heavy ones in `list`. kGroup 0 takes any group size.
template <int kGroup>
HWY_INLINE WeighedRow mean_weights(const UnitePart& part, std::int64_t entries, float* mean,
                                   std::int32_t* list) {
  constexpr std::int64_t kBlock = 16 * kLanesF;
  const TagF df;
  const TagI di;
  const std::int64_t group = kGroup == 0 ? part.group : kGroup;
  // The heaviest token of the sharpest head stands for the largest mean.
  float largest = 0;
  VecF shares[kGroup == 0 ? 1 : kGroup];
  for (std::int64_t g = 0; g < group; ++g) {
    const float share = head_share(part, g);
    largest = std::max(largest, share);
    if constexpr (kGroup != 0) shares[g] = hn::Set(df, share);
  }
  const float listed_from = std::max(kListed * largest, kLeastMean);
  const VecF from = hn::Set(df, listed_from);
  const VecF least = hn::Set(df, kLeastMean);
  VecD low[2] = {hn::Zero(TagD()), hn::Zero(TagD())};
  VecD high[2] = {hn::Zero(TagD()), hn::Zero(TagD())};
  std::int64_t listed = 0;
  for (std::int64_t begin = 0; begin < entries; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, entries);
    VecF all = hn::Zero(df);
    VecF heavy = hn::Zero(df);
    for (std::int64_t i = begin; i < end; i += kLanesF) {
      VecF w = hn::Zero(df);
      for (std::int64_t g = 0; g < group; ++g) {
        const VecF share =
            kGroup == 0 ? hn::Set(df, head_share(part, g)) : shares[kGroup == 0 ? 0 : g];
        const VecF marked = hn::LoadU(df, part.weights + g * part.stride + i);
        w = hn::MulAdd(hn::Max(marked, hn::Zero(df)), share, w);
      }
      const auto tiny = hn::Lt(w, least);
      if (HWY_UNLIKELY(!hn::AllFalse(df, tiny))) {
        const VecF absent = hn::IfThenZeroElse(
            present_in(part, i), hn::Set(df, -std::numeric_limits<float>::infinity()));
        hn::StoreU(hn::IfThenElse(tiny, absent, w), df, mean + i);
        w = hn::IfThenZeroElse(tiny, w);
      } else {
        hn::StoreU(w, df, mean + i);
      }
      all = hn::Add(all, w);
      const auto in = hn::Ge(w, from);
      // No branch: which vectors hold heavy slots is random.
      heavy = hn::Add(heavy, hn::IfThenElseZero(in, w));
      hn::StoreU(compress(hn::BitCast(di, w), hn::RebindMask(di, in)), di, list + listed);
      listed += static_cast<std::int64_t>(hn::CountTrue(df, in));
    }
    add_wide(all, low[0], high[0]);
    add_wide(heavy, low[1], high[1]);
  }
  hn::StoreU(hn::Set(di, kLowestKey), di, list + listed);
  const RowMass mass = {sum_lanes(hn::Add(low[0], high[0])), sum_lanes(hn::Add(low[1], high[1])),
                        listed};
  return {mean, entries, mass, listed_from};
}

// Ranks of the slots whose mean is 0: the mean where f32 can hold it (2^-126 and up), else the
// largest log weight of any head, which is negative.
HWY_NOINLINE void rank_tiny(const UnitePart& part, std::int64_t entries, float* mean) {
  for (std::int64_t i = 0; i < entries; ++i) {
    if (mean[i] != 0) continue;
    double weight = 0;
    double rank = -std::numeric_limits<double>::infinity();
    for (std::int64_t g = 0; g < part.group; ++g) {
      const double total = part.heads[g].total;
      const auto marked = static_cast<double>(part.weights[g * part.stride + i]);
      if (!(marked > -std::numeric_limits<double>::infinity()) || !(total > 0)) continue;
      const double exponent = (marked > 0 ? std::log(marked) : marked) - std::log(total);
      weight += std::exp(exponent) / part.group;
      rank = std::max(rank, exponent);
    }
    mean[i] =
        weight >= 0x1p-126
            ? static_cast<float>(weight)
            : static_cast<float>(std::max(rank, double{std::numeric_limits<float>::lowest()}));
  }
}

// The threshold of the group; `mean` becomes the row it applies to.
template <int kGroup>
HWY_INLINE float group_threshold(const UnitePart& part, std::int64_t entries, float* mean,
                                 std::int32_t* list) {
  const WeighedRow weighed = mean_weights<kGroup>(part, entries, mean, list);
  const float lowest = std::numeric_limits<float>::lowest();
  if (part.p >= 1.0F || !(weighed.mass.total > 0)) return lowest;
  const TopSet top = mass_threshold(weighed, part.p, list);
  const float threshold = key_value(top.key);
  const std::int64_t members = count_from(mean, entries, threshold, part.min_tokens);
  if (members >= part.min_tokens) return threshold;
  if (count_from(mean, entries, kLeastMean, part.min_tokens) < part.min_tokens) {
    rank_tiny(part, entries, mean);
  }
  return floor_threshold(mean, entries, part.min_tokens, top.key, members, list);
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_GROUP_INL_H_
