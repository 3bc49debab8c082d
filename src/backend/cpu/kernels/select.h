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

/// Entries of the int32 scratch of select_top (two rows of keys with slack) and of find_head_set
/// and unite_heads (one row with slack), for rows of `entries`.
[[nodiscard]] constexpr std::int64_t select_scratch_entries(std::int64_t entries) {
  return 2 * (padded_row(entries) + kRowPadding);
}
[[nodiscard]] constexpr std::int64_t prune_scratch_entries(std::int64_t entries) {
  return padded_row(entries) + 2 * kRowPadding;
}

/// A query head's own top-p set: the slots whose marked weight is at least `threshold`.
struct HeadSet {
  float threshold = 0;
  double total = 0;  ///< sum of the weights exp(e - row maximum); 0 for a row without candidates
};

/// One (sequence, KV head) whose rows hold marked weights and whose head sets are known.
struct UnitePart {
  const float* weights = nullptr;  ///< [G, stride] as find_head_set leaves them
  std::int64_t stride = 0;
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

  /// Top-p set of one head. Row: `slots` estimates, in memory up to padded_row(slots). It is
  /// overwritten with marked weights: exp(e - max) where that is above exp(-86), the negative
  /// number e - max below (so the order survives underflow), -inf for slots without a token.
  void (*find_head_set)(float* row, std::int64_t slots, float p, std::int32_t min_tokens,
                        std::int32_t* scratch, HeadSet* set);

  /// Union of the head sets and the forced tokens. Returns the number kept.
  std::int64_t (*unite_heads)(const UnitePart& part, std::int32_t* scratch);
};

TWILIGHT_DECLARE_KERNELS(SelectKernels, select_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_
