// Kept tokens of a unit: a group's top-p sets, or its one set, and the forced tokens.
#include "backend/cpu/kernels/group-inl.h"
#include "backend/cpu/kernels/select.h"
#include "backend/cpu/kernels/tail-inl.h"
#include "backend/cpu/kernels/threshold-inl.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// Lanes [0, count).
HWY_INLINE std::uint32_t low_bits(std::int64_t count) {
  return count >= kLanesF ? static_cast<std::uint32_t>((std::uint64_t{1} << kLanesF) - 1)
         : count <= 0     ? 0U
                          : (1U << count) - 1U;
}

// Writes `compressed`'s first `count` lanes; whole vectors wherever they fit.
HWY_INLINE void store_front(VecI compressed, std::int64_t count, std::int32_t* out,
                            std::int64_t position, std::int64_t capacity) {
  const TagI di;
  if (position + kLanesF <= capacity) {
    hn::StoreU(compressed, di, out + position);
  } else {
    alignas(64) std::int32_t lanes[kRowPadding];
    hn::Store(compressed, di, lanes);
    std::memcpy(out + position, lanes, static_cast<std::size_t>(count) * sizeof(std::int32_t));
  }
}

// Token positions of a vector of slots, and which of them are forced and exist.
struct SlotVector {
  VecI tokens;
  std::uint32_t forced;
};

// Walks the slots a vector at a time without dividing.
class SlotWalker {
 public:
  explicit SlotWalker(const UnitePart& part)
      : part_(part),
        recent_begin_((part.num_tokens / part.page_size - part.forced.recent_pages) *
                      part.page_size),
        whole_(part.page_size % kLanesF == 0) {}

  HWY_INLINE SlotVector next() {
    const TagI di;
    if (whole_) {
      const std::int64_t base = std::int64_t{part_.pages[page_]} * part_.page_size + offset_;
      offset_ += kLanesF;
      if (offset_ == part_.page_size) {
        offset_ = 0;
        ++page_;
      }
      std::uint32_t forced = 0;
      if (base < part_.forced.sink_tokens || base + kLanesF > recent_begin_) {
        forced = low_bits(part_.forced.sink_tokens - base) | ~low_bits(recent_begin_ - base);
        forced &= low_bits(part_.num_tokens - base);
      }
      return {hn::Add(lanes_, hn::Set(di, static_cast<std::int32_t>(base))), forced};
    }
    alignas(64) std::int32_t tokens[kRowPadding];
    std::uint32_t forced = 0;
    for (std::int64_t lane = 0; lane < kLanesF; ++lane) {
      tokens[lane] = -1;
      if (page_ == part_.page_count) continue;
      const std::int64_t token = std::int64_t{part_.pages[page_]} * part_.page_size + offset_;
      if (++offset_ == part_.page_size) {
        offset_ = 0;
        ++page_;
      }
      if (token >= part_.num_tokens) continue;
      tokens[lane] = static_cast<std::int32_t>(token);
      if (token < part_.forced.sink_tokens || token >= recent_begin_) forced |= 1U << lane;
    }
    return {hn::Load(di, tokens), forced};
  }

 private:
  const UnitePart& part_;
  VecI lanes_ = hn::Iota(TagI(), 0);
  std::int64_t recent_begin_;
  bool whole_;
  std::int64_t page_ = 0;
  std::int64_t offset_ = 0;
};

// Sets of slots: those of the s-th row from its threshold on.
struct SlotSets {
  const float* rows;
  std::int64_t stride;
  const HeadSet* heads;
};

// Writes the union of `num_sets` sets and the forced tokens as positions, its bits, and the size of
// each set with the forced tokens. Returns the size of the union. kSets 0 takes any number.
template <int kSets>
HWY_INLINE std::int64_t write_kept(const UnitePart& part, const SlotSets& sets,
                                   std::int64_t num_sets, MaskBits* kept_bits,
                                   std::int32_t* counts_out) {
  const TagF df;
  const std::int64_t slots = part.page_count * part.page_size;
  const std::int64_t n = kSets == 0 ? num_sets : kSets;
  std::int64_t size = 0;
  for (std::int64_t s = 0; s < n; ++s) counts_out[s] = 0;
  SlotWalker walker(part);
  std::uint32_t own[kSets == 0 ? 1 : kSets] = {};
  std::int32_t counts[kSets == 0 ? 1 : kSets] = {};
  for (std::int64_t i = 0; i < slots; i += kLanesF) {
    const SlotVector at = walker.next();
    std::uint32_t bits = at.forced;
    for (std::int64_t s = 0; s < n; ++s) {
      const VecF marked = hn::LoadU(df, sets.rows + s * sets.stride + i);
      const auto in = hn::Ge(marked, hn::Set(df, sets.heads[s].threshold));
      const std::uint32_t set = mask_bits(hn::RebindMask(TagI(), in));
      bits |= set;
      if constexpr (kSets == 0) {
        counts_out[s] += __builtin_popcount(set | at.forced);
      } else {
        own[s] = set;
      }
    }
    kept_bits[i / kLanesF] = static_cast<MaskBits>(bits);
    // No branch on `bits`: which vectors hold kept slots is random.
    if constexpr (kSets != 0) {
      for (std::int64_t s = 0; s < n; ++s) counts[s] += __builtin_popcount(own[s] | at.forced);
    }
    const std::int64_t count = __builtin_popcount(bits);
    store_front(compress(at.tokens, mask_from_bits(bits)), count, part.kept, size,
                part.kept_capacity);
    size += count;
  }
  if constexpr (kSets != 0) std::copy_n(counts, n, counts_out);
  return size;
}

template <int kGroup>
HWY_INLINE std::int64_t unite_group(const UnitePart& part, std::int32_t* scratch) {
  const std::int64_t entries = padded_row(part.page_count * part.page_size);
  auto* mean = reinterpret_cast<float*>(scratch + entries + 2 * kRowPadding);
  auto* kept_bits = reinterpret_cast<MaskBits*>(scratch);
  std::int64_t size = 0;
  if (part.criterion == PruneCriterion::kGroupMean) {
    HeadSet set;
    set.threshold = group_threshold<kGroup>(part, entries, mean, scratch);
    std::int32_t count = 0;
    size = write_kept<1>(part, {mean, 0, &set}, 1, kept_bits, &count);
    std::fill_n(part.head_counts, part.group, count);
  } else {
    size = write_kept<kGroup>(part, {part.weights, part.stride, part.heads}, part.group, kept_bits,
                              part.head_counts);
  }
  write_masses(part, {kept_bits});
  return size;
}

std::int64_t unite_heads(const UnitePart& part, std::int32_t* scratch) {
  switch (part.group) {
    case 1:
      return unite_group<1>(part, scratch);
    case 2:
      return unite_group<2>(part, scratch);
    case 4:
      return unite_group<4>(part, scratch);
    case 8:
      return unite_group<8>(part, scratch);
    default:
      return unite_group<0>(part, scratch);
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
