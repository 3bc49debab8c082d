#include "backend/cpu/kernels/select.h"
#include "backend/cpu/simd.h"

#include "backend/cpu/kernels/select_mass-inl.h"
// Weights of a row, then what is made of them.
#include "backend/cpu/kernels/prune-inl.h"
#include "backend/cpu/kernels/unite-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// Integer keys in the order of the scores: -0 as 0, NaN below -inf.
HWY_INLINE VecI score_keys(VecF scores) {
  const TagI di;
  const TagF df;
  const VecI keys = ordered_keys(hn::BitCast(di, hn::Add(scores, hn::Zero(df))));
  const auto real = hn::RebindMask(di, hn::Eq(scores, scores));
  return hn::IfThenElse(real, keys, hn::Set(di, kLowestKey + 1));
}

std::int64_t select_top(const float* scores, std::int64_t begin, std::int64_t end,
                        std::int64_t count, std::int32_t* out, std::int64_t capacity,
                        std::int32_t* scratch) {
  const TagI di;
  const TagF df;
  const std::int64_t size = end - begin;
  if (count <= 0 || size <= 0) return 0;
  if (count >= size) {
    for (std::int64_t i = 0; i < size; ++i) out[i] = static_cast<std::int32_t>(begin + i);
    return size;
  }
  const std::int64_t entries = padded_row(size);
  std::int32_t* row = scratch;
  std::int32_t* keys = scratch + entries + kRowPadding;
  VecI least = hn::Set(di, std::numeric_limits<std::int32_t>::max());
  VecI most = hn::Set(di, kLowestKey);
  const auto put = [&](std::int64_t i, VecI k) HWY_ATTR {
    hn::StoreU(k, di, row + i);
    hn::StoreU(k, di, keys + i);
    least = hn::Min(least, k);
    most = hn::Max(most, k);
  };
  std::int64_t i = 0;
  for (; i + kLanesF <= size; i += kLanesF) {
    put(i, score_keys(hn::LoadU(df, scores + begin + i)));
  }
  if (i < size) {
    // The missing lanes repeat a real score, so that they do not widen the bracket.
    alignas(64) float tail[kRowPadding];
    for (std::int64_t lane = 0; lane < kLanesF; ++lane) {
      tail[lane] = scores[begin + std::min(i + lane, size - 1)];
    }
    put(i, score_keys(hn::Load(df, tail)));
    i += kLanesF;
  }
  for (std::int64_t pad = size; pad < entries; ++pad) row[pad] = kLowestKey;
  for (std::int64_t pad = size; pad < entries + kRowPadding; ++pad) keys[pad] = kLowestKey;
  const std::int32_t lo = hn::GetLane(hn::MinOfLanes(di, least));
  const std::int32_t hi = hn::GetLane(hn::MaxOfLanes(di, most));
  const TopSet top =
      find_top_set<false>(row, entries, lo, hi, {}, static_cast<double>(count), keys, size);

  // Ties of the threshold go to the lower indices.
  std::int64_t ties_left = count - top.above;
  const bool all_ties = top.members == count;
  const VecI threshold = hn::Set(di, top.key);
  const VecI below = hn::Set(di, top.key - 1);
  const VecI lanes = hn::Iota(di, 0);
  std::int64_t written = 0;
  for (i = 0; i < size; i += kLanesF) {
    const VecI k = hn::LoadU(di, row + i);
    std::uint32_t bits = mask_bits(hn::Gt(k, below));
    if (bits == 0) continue;
    if (!all_ties) {
      std::uint32_t ties = mask_bits(hn::Eq(k, threshold));
      bits ^= ties;
      for (; ties != 0 && ties_left > 0; ties &= ties - 1, --ties_left) bits |= ties & -ties;
    }
    const VecI indices = hn::Add(lanes, hn::Set(di, static_cast<std::int32_t>(begin + i)));
    const std::int64_t taken = __builtin_popcount(bits);
    store_front(compress(indices, mask_from_bits(bits)), taken, out, written, capacity);
    written += taken;
  }
  return written;
}

}  // namespace

const SelectKernels& select_kernels() {
  static constexpr SelectKernels kTable = {select_top, count_by_mass, find_head_set, weigh_head,
                                           unite_heads};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
