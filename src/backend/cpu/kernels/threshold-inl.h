#ifndef TWILIGHT_BACKEND_CPU_KERNELS_THRESHOLD_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_THRESHOLD_INL_H_

// Search for the threshold of a top set: the largest key t such that the keys >= t reach a target
// mass or count. Keys are int32 in the order of the floats they stand for.
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using TagF = hn::ScalableTag<float>;
using TagI = hn::ScalableTag<std::int32_t>;
using TagD = hn::ScalableTag<double>;
using VecF = hn::Vec<TagF>;
using VecI = hn::Vec<TagI>;
using VecD = hn::Vec<TagD>;
constexpr std::int64_t kLanesF = sizeof(VecF) / sizeof(float);
constexpr std::int64_t kLanesD = kLanesF / 2;
static_assert(kRowPadding % kLanesF == 0);

constexpr std::int32_t kLowestKey = std::numeric_limits<std::int32_t>::min();

struct Tally {
  double mass = 0;
  std::int64_t count = 0;
};

struct TopSet {
  std::int32_t key = 0;      ///< members are >= key
  std::int64_t above = 0;    ///< members > key, where the target is a count
  std::int64_t members = 0;  ///< with the ties, likewise
};

// A mask as an integer of its own width: a wider load would wait for the narrower store.
template <bool kWide>
struct MaskBitsOf {
  using Type = std::uint8_t;
};
template <>
struct MaskBitsOf<true> {
  using Type = std::uint16_t;
};
using MaskBits = MaskBitsOf<kLanesF == 16>::Type;

HWY_INLINE std::uint32_t mask_bits(hn::Mask<TagI> mask) {
  std::uint8_t bytes[8];
  hn::StoreMaskBits(TagI(), mask, bytes);
  MaskBits bits = 0;
  std::memcpy(&bits, bytes, sizeof(bits));
  return bits;
}

HWY_INLINE hn::Mask<TagI> mask_from_bits(std::uint32_t bits) {
  const auto narrow = static_cast<MaskBits>(bits);
  std::uint8_t bytes[8];
  std::memcpy(bytes, &narrow, sizeof(narrow));
  return hn::LoadMaskBits(TagI(), bytes);
}

#if HWY_TARGET == HWY_AVX2
// Lane numbers of the set bits of a byte, four bits each, lowest first. hn::Compress of this target
// copies its table to the stack on every call under GCC 12.
struct CompressTable {
  std::uint32_t packed[256] = {};
  constexpr CompressTable() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      int shift = 0;
      for (std::uint32_t lane = 0; lane < 8; ++lane) {
        if ((byte >> lane & 1U) == 0) continue;
        packed[byte] |= lane << shift;
        shift += 4;
      }
    }
  }
};
constexpr CompressTable kCompressTable;

HWY_INLINE VecI compress(VecI v, hn::Mask<TagI> mask) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i packed =
      _mm256_set1_epi32(static_cast<int>(kCompressTable.packed[mask_bits(mask)]));
  return VecI{_mm256_permutevar8x32_epi32(v.raw, _mm256_srlv_epi32(packed, shifts))};
}
#else
HWY_INLINE VecI compress(VecI v, hn::Mask<TagI> mask) { return hn::Compress(v, mask); }
#endif

// Adds f32 lanes to double lanes.
HWY_INLINE void add_wide(VecF v, VecD& low, VecD& high) {
  const hn::Half<TagF> half;
  low = hn::Add(low, hn::PromoteTo(TagD(), hn::LowerHalf(half, v)));
  high = hn::Add(high, hn::PromoteTo(TagD(), hn::UpperHalf(half, v)));
}

// Largest lane of a vector without NaN; -inf where all are (hn::MaxOfLanes of the emulated target
// gives the lowest finite number).
HWY_INLINE float max_of_lanes(VecF v) {
  alignas(64) float lanes[kRowPadding];
  hn::Store(v, TagF(), lanes);
  float largest = lanes[0];
  for (std::int64_t i = 1; i < kLanesF; ++i) largest = std::max(largest, lanes[i]);
  return largest;
}

HWY_INLINE double sum_lanes(VecD v) { return hn::GetLane(hn::SumOfLanes(TagD(), v)); }

// Copies the keys in [lo, hi] of a row of whole vectors to `to` (may be `row`: a vector is read
// before anything is stored at or past it) and closes them with a vector of kLowestKey. Register
// compress and a full store, since a compressing store to memory costs ten times as much on some
// machines. `above`, where given, grows by the mass or count of the keys in (hi, top].
template <bool kMass>
HWY_INLINE std::int64_t narrow_to(const std::int32_t* row, std::int64_t entries, std::int32_t lo,
                                  std::int32_t hi, std::int32_t* to, std::int32_t top = 0,
                                  Tally* above = nullptr) {
  const TagI di;
  const TagF df;
  const VecI below_lo = hn::Set(di, lo - 1);
  const VecI vhi = hn::Set(di, hi);
  const VecI vtop = hn::Set(di, top);
  VecD low = hn::Zero(TagD());
  VecD high = hn::Zero(TagD());
  std::int64_t count_above = 0;
  std::int64_t size = 0;
  for (std::int64_t i = 0; i < entries; i += kLanesF) {
    const VecI keys = hn::LoadU(di, row + i);
    const auto over = hn::Gt(keys, vhi);
    const auto inside = hn::AndNot(over, hn::Gt(keys, below_lo));
    if (above != nullptr) {
      const auto counted = hn::AndNot(hn::Gt(keys, vtop), over);
      if constexpr (kMass) {
        add_wide(hn::BitCast(df, hn::IfThenElseZero(counted, keys)), low, high);
      } else {
        count_above += static_cast<std::int64_t>(hn::CountTrue(di, counted));
      }
    }
    if (hn::AllFalse(di, inside)) continue;
    hn::StoreU(compress(keys, inside), di, to + size);
    size += static_cast<std::int64_t>(hn::CountTrue(di, inside));
  }
  hn::StoreU(hn::Set(di, kLowestKey), di, to + size);
  if (above != nullptr) {
    above->count += count_above;
    above->mass += sum_lanes(hn::Add(low, high));
  }
  return size;
}

// Double lanes: a sum of n weights is off by less than n / kLanesF * 2^-53 of itself, so the set
// for a larger p is never the smaller one by rounding (steps of p are 2^-24 of it).
HWY_INLINE double mass_of(const std::int32_t* keys, std::int64_t size) {
  const TagI di;
  const TagF df;
  VecD low = hn::Zero(TagD());
  VecD high = hn::Zero(TagD());
  for (std::int64_t i = 0; i < size; i += kLanesF) {
    const VecI k = hn::LoadU(di, keys + i);
    const auto real = hn::Gt(k, hn::Set(di, kLowestKey));
    add_wide(hn::BitCast(df, hn::IfThenElseZero(real, k)), low, high);
  }
  return sum_lanes(hn::Add(low, high));
}

constexpr int kLevels = 16;

// out[j]: mass or count of every `step`-th key >= levels[j]; one lane per level, so no sums across
// lanes.
template <bool kMass>
HWY_INLINE void measure_levels(const std::int32_t* keys, std::int64_t size, std::int64_t step,
                               const std::int32_t* levels, float* out) {
  const TagI di;
  const TagF df;
  for (int j = 0; j < kLevels; j += static_cast<int>(kLanesF)) {
    const VecI below_level = hn::Sub(hn::LoadU(di, levels + j), hn::Set(di, 1));
    VecF sum0 = hn::Zero(df);
    VecF sum1 = hn::Zero(df);
    const auto part = [&](std::int64_t i) HWY_ATTR {
      const VecI key = hn::Set(di, keys[i]);
      const VecF weight = kMass ? hn::BitCast(df, key) : hn::Set(df, 1.0F);
      return hn::IfThenElseZero(hn::RebindMask(df, hn::Gt(key, below_level)), weight);
    };
    std::int64_t i = 0;
    for (; i + step < size; i += 2 * step) {
      sum0 = hn::Add(sum0, part(i));
      sum1 = hn::Add(sum1, part(i + step));
    }
    if (i < size) sum0 = hn::Add(sum0, part(i));
    hn::StoreU(hn::Add(sum0, sum1), df, out + j);
  }
}

constexpr std::int64_t kExactSize = 32;

// The answer among at most kExactSize keys: for each of them the mass of all that are not smaller,
// without sorting.
template <bool kMass>
HWY_INLINE TopSet finish_exactly(const std::int32_t* keys, std::int64_t size, const Tally& above,
                                 double target) {
  const TagD dd;
  alignas(64) double order[kExactSize + kRowPadding];
  alignas(64) double reached[kExactSize + kRowPadding];
  for (std::int64_t i = 0; i < size; ++i) order[i] = static_cast<double>(keys[i]);
  for (std::int64_t i = size; i < padded_row(size); ++i) order[i] = 0;
  const double base = kMass ? above.mass : static_cast<double>(above.count);
  for (std::int64_t i = 0; i < size; i += kLanesD) {
    const VecD level = hn::Load(dd, order + i);
    VecD sum = hn::Zero(dd);
    for (std::int64_t j = 0; j < size; ++j) {
      float weight = 1.0F;
      if constexpr (kMass) std::memcpy(&weight, keys + j, sizeof(weight));
      const auto counts = hn::Ge(hn::Set(dd, order[j]), level);
      sum = hn::Add(sum, hn::IfThenElseZero(counts, hn::Set(dd, static_cast<double>(weight))));
    }
    hn::Store(hn::Add(sum, hn::Set(dd, base)), dd, reached + i);
  }
  // Rounding can leave even all of them short of the target: then all are members.
  std::int32_t best = std::numeric_limits<std::int32_t>::max();
  for (std::int64_t i = 0; i < size; ++i) best = std::min(best, keys[i]);
  for (std::int64_t i = 0; i < size; ++i) {
    if (reached[i] >= target && keys[i] > best) best = keys[i];
  }
  TopSet set{best, above.count, above.count};
  for (std::int64_t i = 0; i < size; ++i) {
    set.above += keys[i] > best ? 1 : 0;
    set.members += keys[i] >= best ? 1 : 0;
  }
  return set;
}

// Smallest and largest key, and the f32 mass of all.
struct Survey {
  std::int32_t least = 0;
  std::int32_t most = 0;
  float mass = 0;
};

template <bool kMass>
HWY_INLINE Survey survey(const std::int32_t* keys, std::int64_t size) {
  const TagI di;
  const TagF df;
  VecI least = hn::Set(di, std::numeric_limits<std::int32_t>::max());
  VecI most = hn::Set(di, kLowestKey);
  VecF mass = hn::Zero(df);
  for (std::int64_t i = 0; i < size; i += kLanesF) {
    const VecI k = hn::LoadU(di, keys + i);
    const auto closing = hn::Eq(k, hn::Set(di, kLowestKey));
    least = hn::Min(least, hn::IfThenElse(closing, least, k));
    most = hn::Max(most, k);
    if constexpr (kMass) mass = hn::Add(mass, hn::BitCast(df, hn::IfThenZeroElse(closing, k)));
  }
  return {hn::GetLane(hn::MinOfLanes(di, least)), hn::GetLane(hn::MaxOfLanes(di, most)),
          kMass ? hn::GetLane(hn::SumOfLanes(df, mass)) : static_cast<float>(size)};
}

constexpr std::int64_t kSample = 256;

// Where the threshold should lie, judged from every `step`-th of the keys in the bracket. `mass` is
// that of the whole bracket. Ends that the keys do not tell are left alone. A wrong guess costs a
// pass, never the answer.
template <bool kMass>
HWY_INLINE void guess_bracket(const std::int32_t* keys, std::int64_t size, const Survey& range,
                              double mass, double missing, std::int32_t* lo, std::int32_t* hi) {
  const std::int64_t step = (size + kSample - 1) / kSample;
  const std::int64_t sampled = (size + step - 1) / step;
  alignas(64) std::int32_t levels[kLevels];
  alignas(64) float measured[kLevels];
  // The lowest level is the smallest key, so its measure is that of the sample as a whole.
  const std::int64_t span = std::int64_t{range.most} - range.least;
  for (int j = 0; j < kLevels; ++j) {
    levels[j] = static_cast<std::int32_t>(range.least + span * j / kLevels);
  }
  measure_levels<kMass>(keys, size, step, levels, measured);
  const double scale = mass / measured[0];
  double margin = kMass ? 1e-5 * mass : 0.0;
  if (step > 1) {
    // Two standard deviations of the sampled share; unequal weights (within a few octaves, mostly)
    // make a sample worth 2.5 times fewer equal ones.
    const double share = std::clamp(missing / mass, 0.0, 1.0);
    const double variance =
        (kMass ? 2.5 : 1.0) * share * (1 - share) / static_cast<double>(sampled);
    margin = mass * (2 * std::sqrt(variance) + 2.0 / static_cast<double>(sampled));
  }
  for (int j = 0; j < kLevels; ++j) {
    const double estimate = scale * measured[j];
    if (j > 0 && estimate >= missing + margin) *lo = levels[j];
    if (estimate < missing - margin) {
      *hi = std::max(*lo, levels[j] - 1);
      break;
    }
  }
}

// The top set of a row of whole vectors. On entry the threshold is in [lo, hi], `above` tells of
// the keys > hi, and `keys`, which has room for the row, holds the row's keys in [lo, hi], `size`
// of them, closed by kLowestKey.
template <bool kMass>
TopSet find_top_set(const std::int32_t* row, std::int64_t entries, std::int32_t lo, std::int32_t hi,
                    Tally above, double target, std::int32_t* keys, std::int64_t size) {
  // Guesses shrink the bracket about fivefold; halving it, after many, bounds the worst case.
  constexpr int kMaxGuesses = 12;
  const auto measure_of = [](const Tally& t) {
    return kMass ? t.mass : static_cast<double>(t.count);
  };
  for (int round = 0;; ++round) {
    std::int32_t from = lo;
    std::int32_t to = hi;
    const double missing = target - measure_of(above);
    if (size <= kExactSize && size > 0) return finish_exactly<kMass>(keys, size, above, target);
    if (size == 0) return {lo, above.count, above.count};
    const Survey all = survey<kMass>(keys, size);
    from = lo = all.least;
    to = hi = all.most;
    if (lo == hi) return {lo, above.count, above.count + size};
    if (round < kMaxGuesses) {
      guess_bracket<kMass>(keys, size, all, all.mass, missing, &from, &to);
    }
    if (from == lo && to == hi) {
      from = static_cast<std::int32_t>(lo + (std::int64_t{hi} - lo) / 2 + 1);
    }
    Tally over;
    size = narrow_to<kMass>(keys, size, from, to, keys, hi, &over);
    const Tally inside{kMass ? mass_of(keys, size) : 0.0, size};
    if (to < hi && measure_of(over) >= missing) {
      lo = to + 1;
      size = narrow_to<kMass>(row, entries, lo, hi, keys);
    } else if (from > lo && measure_of(over) + measure_of(inside) < missing) {
      above.mass += over.mass + inside.mass;
      above.count += over.count + inside.count;
      hi = from - 1;
      size = narrow_to<kMass>(row, entries, lo, hi, keys);
    } else {
      above.mass += over.mass;
      above.count += over.count;
      lo = from;
      hi = to;
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_THRESHOLD_INL_H_
