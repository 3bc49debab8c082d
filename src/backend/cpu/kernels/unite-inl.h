// Union of a group's top-p sets with the forced tokens.
#include "backend/cpu/kernels/select.h"
#include "backend/cpu/simd.h"

#include "backend/cpu/kernels/threshold-inl.h"

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

// A vector of slots with kept ones among them.
struct KeptVector {
  std::int32_t slot;
  std::uint32_t bits;
};

HWY_INLINE float kept_mass(const float* row, double total, const KeptVector* list,
                           std::int64_t size) {
  const TagF df;
  VecD low = hn::Zero(TagD());
  VecD high = hn::Zero(TagD());
  const auto weights = [&](std::int64_t i) HWY_ATTR {
    const VecF marked = hn::LoadU(df, row + list[i].slot);
    const auto kept = hn::RebindMask(df, mask_from_bits(list[i].bits));
    return hn::Max(hn::IfThenElseZero(kept, marked), hn::Zero(df));
  };
  // Four vectors meet in f32 before they are widened: two roundings, no more than the f32 result
  // itself has.
  std::int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    add_wide(hn::Add(hn::Add(weights(i), weights(i + 1)), hn::Add(weights(i + 2), weights(i + 3))),
             low, high);
  }
  for (; i < size; ++i) add_wide(weights(i), low, high);
  const double mass = sum_lanes(hn::Add(low, high));
  return total > 0 ? static_cast<float>(std::min(1.0, mass / total)) : 0.0F;
}

// kGroup 0 takes any group size.
template <int kGroup>
HWY_INLINE std::int64_t unite(const UnitePart& part, std::int32_t* scratch) {
  const TagF df;
  const int group = kGroup == 0 ? part.group : kGroup;
  const std::int64_t slots = part.page_count * part.page_size;
  auto* list = reinterpret_cast<KeptVector*>(scratch);
  std::int64_t listed = 0;
  std::int64_t size = 0;
  for (int g = 0; g < group; ++g) part.head_counts[g] = 0;
  SlotWalker walker(part);
  std::uint32_t own[kGroup == 0 ? 1 : kGroup] = {};
  std::int32_t counts[kGroup == 0 ? 1 : kGroup] = {};
  for (std::int64_t i = 0; i < slots; i += kLanesF) {
    const SlotVector at = walker.next();
    std::uint32_t bits = at.forced;
    for (int g = 0; g < group; ++g) {
      const VecF marked = hn::LoadU(df, part.weights + g * part.stride + i);
      const auto in = hn::Ge(marked, hn::Set(df, part.heads[g].threshold));
      const std::uint32_t head = mask_bits(hn::RebindMask(TagI(), in));
      bits |= head;
      if constexpr (kGroup == 0) {
        part.head_counts[g] += __builtin_popcount(head | at.forced);
      } else {
        own[g] = head;
      }
    }
    if (bits == 0) continue;
    if constexpr (kGroup != 0) {
      for (int g = 0; g < group; ++g) counts[g] += __builtin_popcount(own[g] | at.forced);
    }
    list[listed++] = {static_cast<std::int32_t>(i), bits};
    const std::int64_t count = __builtin_popcount(bits);
    store_front(compress(at.tokens, mask_from_bits(bits)), count, part.kept, size,
                part.kept_capacity);
    size += count;
  }
  for (int g = 0; g < group; ++g) {
    if constexpr (kGroup != 0) part.head_counts[g] = counts[g];
    part.head_mass[g] =
        kept_mass(part.weights + g * part.stride, part.heads[g].total, list, listed);
  }
  return size;
}

std::int64_t unite_heads(const UnitePart& part, std::int32_t* scratch) {
  switch (part.group) {
    case 1:
      return unite<1>(part, scratch);
    case 2:
      return unite<2>(part, scratch);
    case 4:
      return unite<4>(part, scratch);
    case 8:
      return unite<8>(part, scratch);
    default:
      return unite<0>(part, scratch);
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
