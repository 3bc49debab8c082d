#ifndef TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_

#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

/// Rows that the kernels read in whole vectors are padded to this many entries.
inline constexpr std::int64_t kRowPadding = 16;

[[nodiscard]] constexpr std::int64_t padded_row(std::int64_t entries) {
  return (entries + kRowPadding - 1) / kRowPadding * kRowPadding;
}

/// Entries of the int32 scratch of select_top (two rows of keys with slack) and count_by_mass
/// (those and a row of doubles), for rows of `entries`.
[[nodiscard]] constexpr std::int64_t select_scratch_entries(std::int64_t entries) {
  return 4 * (padded_row(entries) + kRowPadding);
}
/// The same of find_head_set and unite_heads: two rows, one with slack.
[[nodiscard]] constexpr std::int64_t prune_scratch_entries(std::int64_t entries) {
  return 2 * padded_row(entries) + 2 * kRowPadding;
}

/// What is known of a query head's row once it is weighed.
struct HeadSet {
  /// Slots whose marked weight is at least this are the head's own top-p set (kPerHead).
  float threshold = 0;
  float maximum = 0;  ///< largest estimate, -inf for a row without candidates
  double total = 0;   ///< sum of the weights exp(e - maximum); 0 for a row without candidates
};

/// One (sequence, KV head) whose rows hold marked weights.
struct UnitePart {
  PruneCriterion criterion = PruneCriterion::kPerHead;
  float p = 1;                          ///< kGroupMean: largest p of the group
  std::int32_t min_tokens = 0;          ///< kGroupMean
  const float* weights = nullptr;       ///< [G, stride] as find_head_set or weigh_head leaves them
  std::int64_t stride = 0;              ///< >= padded_row(page_count * page_size)
  const HeadSet* heads = nullptr;       ///< [G]
  const std::int32_t* pages = nullptr;  ///< [page_count] ascending logical page numbers
  std::int64_t page_count = 0;
  std::int32_t group = 0;  ///< G
  std::int32_t page_size = 0;
  std::int64_t num_tokens = 0;  ///< N
  ForcedTokens forced;
  std::int32_t* kept = nullptr;  ///< ascending token positions
  std::int64_t kept_capacity = 0;
  std::int32_t* head_counts = nullptr;  ///< [G]
  float* head_mass = nullptr;           ///< [G]
  float* tail_mass = nullptr;           ///< [G, tail_stride], page_count of each row; or null
  std::int64_t tail_stride = 0;
  float* tail_shift = nullptr;  ///< [G]; null where tail_mass is
};

/// Scores of the sealed pages of a unit, logs of mass; pages outside [begin, end) are forced.
struct MassPart {
  const float* scores = nullptr;
  std::int64_t pages = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  double mass = 0;  ///< share of the mass of all pages
};

/// Kernels of selection and pruning, each on one unit and without threading. Thread-safe for
/// disjoint outputs and scratch.
struct SelectKernels {
  /// Indices in [begin, end) of the `count` best scores, ties to the lower index, NaN last, written
  /// ascending. Nothing past out[capacity) is touched; between the result and there may be.
  /// Returns how many were written: min(count, end - begin).
  std::int64_t (*select_top)(const float* scores, std::int64_t begin, std::int64_t end,
                             std::int64_t count, std::int32_t* out, std::int64_t capacity,
                             std::int32_t* scratch);

  /// How many of the best scores in [begin, end) it takes, with the forced pages, to reach the
  /// share; in double, NaN counts 0.
  std::int64_t (*count_by_mass)(const MassPart& part, std::int32_t* scratch);

  /// Weighs one head's row and finds its top-p set. Row: `slots` estimates, in memory up to
  /// padded_row(slots). It is overwritten with marked weights: exp(e - max) where that is above
  /// exp(-86), the negative number e - max below (so the order survives underflow), -inf for slots
  /// without a token and NaN. `maximum` points to the largest estimate, or is null.
  void (*find_head_set)(float* row, std::int64_t slots, const float* maximum, float p,
                        std::int32_t min_tokens, std::int32_t* scratch, HeadSet* set);

  /// The same without a set of its own, for kGroupMean.
  void (*weigh_head)(float* row, std::int64_t slots, const float* maximum, HeadSet* set);

  /// Union of the head sets, or the set of the group, and the forced tokens; counts, masses and
  /// tail. Returns the number kept.
  std::int64_t (*unite_heads)(const UnitePart& part, std::int32_t* scratch);
};

TWILIGHT_DECLARE_KERNELS(SelectKernels, select_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_
