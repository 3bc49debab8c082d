// Top-p pruning of one head's estimates.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_PRUNE_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_PRUNE_INL_H_

#include "backend/cpu/kernels/select.h"
#include "backend/cpu/simd.h"

#include "backend/cpu/kernels/threshold-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// exp(-86) is the last power well inside the normal floats; everything below keeps its exponent x
// as the mark instead.
constexpr float kLeastExponent = -86.0F;

// exp(x) for -86 < x <= 0 within 3 units in the last place, exactly 1 at 0, never above 1. x = (n +
// r) ln 2: the product with log2(e) is not rounded before n is taken off it (multiply-add), and the
// second part of log2(e) keeps the result good where |x| is large. Degree 5 for 2^r, relative error
// 9.1e-8. Elsewhere the result means nothing.
HWY_INLINE VecF exp_nonpositive(VecF x) {
  const TagF df;
  const TagI di;
  const VecF log2e = hn::Set(df, 1.44269502F);
  const VecF rounder = hn::Set(df, 0x1.8p23F);
  const VecF shifted = hn::MulAdd(x, log2e, rounder);
  const VecF n = hn::Sub(shifted, rounder);
  VecF r = hn::MulSub(x, log2e, n);
  r = hn::MulAdd(x, hn::Set(df, 1.92596298909109e-8F), r);
  VecF y = hn::Set(df, 0.0013264695880934596F);
  y = hn::MulAdd(y, r, hn::Set(df, 0.009671512991189957F));
  y = hn::MulAdd(y, r, hn::Set(df, 0.05550733953714371F));
  y = hn::MulAdd(y, r, hn::Set(df, 0.24022242426872253F));
  y = hn::MulAdd(y, r, hn::Set(df, 0.6931470036506653F));
  y = hn::MulAdd(y, r, hn::Set(df, 1.0F));
  const VecI power = hn::Add(hn::BitCast(di, y), hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  return hn::BitCast(df, power);
}

// The order of floats as the order of int32; its own inverse.
HWY_INLINE std::int32_t ordered_key(float value) {
  std::int32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? bits ^ std::numeric_limits<std::int32_t>::max() : bits;
}
HWY_INLINE float key_value(std::int32_t key) {
  if (key < 0) key ^= std::numeric_limits<std::int32_t>::max();
  float value = 0;
  std::memcpy(&value, &key, sizeof(value));
  return value;
}
HWY_INLINE VecI ordered_keys(VecI bits) {
  const TagI di;
  const VecI low31 = hn::Set(di, std::numeric_limits<std::int32_t>::max());
  return hn::Xor(bits, hn::And(hn::BroadcastSignBit(bits), low31));
}

// The larger one; a NaN in `v` loses.
HWY_INLINE VecF larger(VecF v, VecF best) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_EMU128
  return hn::Max(v, best);  // gives the second where either is NaN
#else
  return hn::IfThenElse(hn::Gt(v, best), v, best);
#endif
}

HWY_INLINE float row_maximum(const float* row, std::int64_t entries) {
  const TagF df;
  VecF m0 = hn::Set(df, -std::numeric_limits<float>::infinity());
  VecF m1 = m0;
  std::int64_t i = 0;
  for (; i + 2 * kLanesF <= entries; i += 2 * kLanesF) {
    m0 = larger(hn::LoadU(df, row + i), m0);
    m1 = larger(hn::LoadU(df, row + i + kLanesF), m1);
  }
  if (i < entries) m0 = larger(hn::LoadU(df, row + i), m0);
  return max_of_lanes(hn::Max(m0, m1));
}

// Weights from here on, as fractions of the largest one, are listed while the row is weighed: the
// threshold is mostly among them, and the list is a tenth of the row. For a head of 8192 slots in
// cache (Zen 4): 2.9 to 3.6 us, 7.0 where all weights are alike; with masses at two levels and
// another pass over the row 3.7 to 4.4, and 6.1. A lower limit lists noise: its vectors come with
// and without entries at random, up to 1.1 us of mispredicted branches.
constexpr float kListed = 0x1p-8F;

struct RowMass {
  double total = 0;
  double listed_mass = 0;
  std::int64_t listed = 0;  ///< keys >= kListed, closed by kLowestKey
};

// Turns estimates into marked weights and, for kList, lists the heavy ones in `list`. f32 lanes
// meet in double ones every 16 vectors: masses are within 16 * 2^-24 of themselves, mostly a tenth
// of that, and do not depend on p.
template <bool kList>
HWY_INLINE RowMass weigh(float* row, std::int64_t entries, float maximum, std::int32_t* list) {
  constexpr std::int64_t kBlock = 16 * kLanesF;
  const TagF df;
  const TagI di;
  const VecF vmax = hn::Set(df, maximum);
  const VecF least = hn::Set(df, kLeastExponent);
  const VecF listed_from = hn::Set(df, kListed);
  VecD low[2] = {hn::Zero(TagD()), hn::Zero(TagD())};
  VecD high[2] = {hn::Zero(TagD()), hn::Zero(TagD())};
  std::int64_t listed = 0;
  for (std::int64_t begin = 0; begin < entries; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, entries);
    VecF all = hn::Zero(df);
    VecF heavy = hn::Zero(df);
    const auto put = [&](VecF w) HWY_ATTR {
      all = hn::Add(all, w);
      if constexpr (!kList) return;
      const auto in = hn::Ge(w, listed_from);
      if (hn::AllFalse(df, in)) return;  // without this branch a fifth slower
      heavy = hn::Add(heavy, hn::IfThenElseZero(in, w));
      const std::uint32_t bits = mask_bits(hn::RebindMask(di, in));
      hn::StoreU(compress(hn::BitCast(di, w), hn::RebindMask(di, in)), di, list + listed);
      listed += __builtin_popcount(bits);
    };
    // Of whole blocks few hold weights that underflow: one look spares the others what those need.
    VecI deepest = hn::Zero(di);  // |x| as bits, by which a NaN is deep too
    for (std::int64_t i = begin; i < end; i += kLanesF) {
      const VecF x = hn::Sub(hn::LoadU(df, row + i), vmax);
      deepest = hn::Max(deepest, hn::BitCast(di, hn::Abs(x)));
    }
    if (hn::AllTrue(di, hn::Lt(deepest, hn::BitCast(di, hn::Neg(least))))) {
      for (std::int64_t i = begin; i < end; i += kLanesF) {
        const VecF w = exp_nonpositive(hn::Sub(hn::LoadU(df, row + i), vmax));
        hn::StoreU(w, df, row + i);
        put(w);
      }
    } else {
      const VecF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
      for (std::int64_t i = begin; i < end; i += kLanesF) {
        const VecF x = hn::Sub(hn::LoadU(df, row + i), vmax);
        const auto weighs = hn::Gt(x, least);
        const VecF w = hn::IfThenElseZero(weighs, exp_nonpositive(x));
        const VecF mark = hn::IfThenElse(hn::Eq(x, x), x, lowest);
        hn::StoreU(hn::IfThenElse(weighs, w, mark), df, row + i);
        put(w);
      }
    }
    add_wide(all, low[0], high[0]);
    if constexpr (kList) add_wide(heavy, low[1], high[1]);
  }
  if constexpr (kList) hn::StoreU(hn::Set(di, kLowestKey), di, list + listed);
  return {sum_lanes(hn::Add(low[0], high[0])), sum_lanes(hn::Add(low[1], high[1])), listed};
}

// Entries from `threshold` on, counted up to the first vector that makes them `enough`.
HWY_INLINE std::int64_t count_from(const float* row, std::int64_t entries, float threshold,
                                   std::int64_t enough) {
  const TagF df;
  const VecF t = hn::Set(df, threshold);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < entries && count < enough; i += kLanesF) {
    count += static_cast<std::int64_t>(hn::CountTrue(df, hn::Ge(hn::LoadU(df, row + i), t)));
  }
  return count;
}

// A key above 0 that at least `wanted` keys below `key` reach, if so many are above 0 at all: the
// wanted-th largest of the maxima of 32 disjoint parts of the row.
HWY_INLINE std::int32_t floor_bound(const std::int32_t* bits, std::int64_t entries,
                                    std::int64_t wanted, std::int32_t key, std::int32_t* maxima) {
  constexpr std::int64_t kParts = kExactSize / kLanesF;
  if (wanted > kExactSize) return 1;
  const TagI di;
  const VecI vkey = hn::Set(di, key);
  VecI best[kParts];
  for (VecI& b : best) b = hn::Zero(di);
  for (std::int64_t i = 0; i < entries; i += kParts * kLanesF) {
    for (std::int64_t part = 0; part < kParts; ++part) {
      const std::int64_t at = i + part * kLanesF;
      if (at >= entries) break;
      const VecI k = hn::LoadU(di, bits + at);
      best[part] = hn::Max(best[part], hn::IfThenElseZero(hn::Gt(vkey, k), k));
    }
  }
  for (std::int64_t part = 0; part < kParts; ++part) {
    hn::StoreU(best[part], di, maxima + part * kLanesF);
  }
  const TopSet top = finish_exactly<false>(maxima, kExactSize, {}, static_cast<double>(wanted));
  return std::max(top.key, 1);
}

// The threshold that lets `floor` slots in, given that those >= `key` are `members` and too few.
// The search among weights above 0 comes first, since it needs no other form of the row.
HWY_INLINE float floor_threshold(float* row, std::int64_t entries, std::int64_t floor,
                                 std::int32_t key, std::int64_t members, std::int32_t* keys) {
  auto* bits = reinterpret_cast<std::int32_t*>(row);
  const auto target = static_cast<double>(floor);
  const Tally above{0.0, members};
  const std::int32_t lo = floor_bound(bits, entries, floor - members, key, keys);
  const std::int64_t positive = narrow_to<false>(bits, entries, lo, key - 1, keys);
  if (members + positive >= floor) {
    return key_value(
        find_top_set<false>(bits, entries, lo, key - 1, above, target, keys, positive).key);
  }
  const TagI di;
  const auto flip = [&]() HWY_ATTR {
    for (std::int64_t i = 0; i < entries; i += kLanesF) {
      hn::StoreU(ordered_keys(hn::LoadU(di, bits + i)), di, bits + i);
    }
  };
  flip();
  const std::int32_t lowest = ordered_key(std::numeric_limits<float>::lowest());
  const std::int64_t rest = narrow_to<false>(bits, entries, lowest, key - 1, keys);
  float threshold = std::numeric_limits<float>::lowest();
  if (members + rest > floor) {
    threshold = key_value(
        find_top_set<false>(bits, entries, lowest, key - 1, above, target, keys, rest).key);
  }
  flip();
  return threshold;
}

// Weights of a row known to the search for its threshold: `mass` is what `weigh` says, `listed` the
// keys from `listed_from` on in `list`.
struct WeighedRow {
  float* row;
  std::int64_t entries;
  RowMass mass;
  float listed_from;
};

// The largest weight t such that those >= t reach p of the total.
HWY_INLINE TopSet mass_threshold(const WeighedRow& r, float p, std::int32_t* list) {
  const double target = static_cast<double>(p) * r.mass.total;
  // Whether the threshold is listed depends on p through the target alone, so a larger p never ends
  // in a higher bracket.
  std::int32_t hi = ordered_key(2.0F);
  std::int32_t lo = ordered_key(r.listed_from);
  Tally above;
  std::int64_t size = r.mass.listed;
  const auto* bits = reinterpret_cast<const std::int32_t*>(r.row);
  if (r.mass.listed_mass < target) {
    // All weights below (1 - p) total / slots together are less than what may be dropped.
    const double bound =
        (1.0 - static_cast<double>(p)) * r.mass.total / static_cast<double>(r.entries);
    hi = lo - 1;
    lo = ordered_key(
        std::max(static_cast<float>(bound * (1 - 1e-6)), std::numeric_limits<float>::min()));
    lo = std::min(lo, hi);
    above.mass = r.mass.listed_mass;
    size = narrow_to<true>(bits, r.entries, lo, hi, list);
  }
  return find_top_set<true>(bits, r.entries, lo, hi, above, target, list, size);
}

// Makes a row of estimates one of marked weights, NaN as -inf; false without candidates.
template <bool kList>
HWY_INLINE bool weigh_row(float* row, std::int64_t slots, const float* known, std::int32_t* list,
                          RowMass* mass, HeadSet* set) {
  const float kInfinity = std::numeric_limits<float>::infinity();
  const std::int64_t entries = padded_row(slots);
  for (std::int64_t i = slots; i < entries; ++i) row[i] = -kInfinity;
  float maximum = known != nullptr ? *known : row_maximum(row, entries);
  *set = {kInfinity, maximum, 0.0};
  if (!(maximum > -kInfinity)) {
    for (std::int64_t i = 0; i < entries; ++i) row[i] = -kInfinity;
    return false;
  }
  if (maximum == kInfinity) {
    // Infinite scores share the mass; as the largest finite number they can be subtracted.
    maximum = std::numeric_limits<float>::max();
    for (std::int64_t i = 0; i < entries; ++i) row[i] = row[i] > maximum ? maximum : row[i];
  }
  *mass = weigh<kList>(row, entries, maximum, list);
  set->total = mass->total;
  return true;
}

void weigh_head(float* row, std::int64_t slots, const float* maximum, HeadSet* set) {
  RowMass mass;
  weigh_row<false>(row, slots, maximum, nullptr, &mass, set);
}

void find_head_set(float* row, std::int64_t slots, const float* maximum, float p,
                   std::int32_t min_tokens, std::int32_t* scratch, HeadSet* set) {
  RowMass mass;
  if (!weigh_row<true>(row, slots, maximum, scratch, &mass, set)) return;
  set->threshold = std::numeric_limits<float>::lowest();
  if (p >= 1.0F) return;
  const std::int64_t entries = padded_row(slots);
  const TopSet top = mass_threshold({row, entries, mass, kListed}, p, scratch);
  set->threshold = key_value(top.key);
  // No weight is above 1, so a mass of min_tokens takes that many.
  if (static_cast<double>(p) * mass.total < min_tokens) {
    const std::int64_t members = count_from(row, entries, set->threshold, min_tokens);
    if (members < min_tokens) {
      set->threshold = floor_threshold(row, entries, min_tokens, top.key, members, scratch);
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_PRUNE_INL_H_
