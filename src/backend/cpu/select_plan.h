#ifndef TWILIGHT_BACKEND_CPU_SELECT_PLAN_H_
#define TWILIGHT_BACKEND_CPU_SELECT_PLAN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/index.h"
#include "backend/cpu/kernels/select.h"
#include "core/buffer.h"
#include "ops/params.h"

namespace twilight::cpu {

/// From so many (sequence, KV head) units a thread on, a thread takes whole units through all
/// stages of a step, so that scores and weights stay in its core's cache. With fewer, every stage
/// is shared out over the threads.
inline constexpr std::int64_t kUnitsPerThread = 2;

/// Tiles of the shared-out stages: 64 KiB of Quest bf16 summaries and 68 KiB of 4-bit keys at D =
/// 128, P = 16; tens of microseconds, far more than handing out a task costs.
inline constexpr std::int64_t kScoreTilePages = 128;
inline constexpr std::int64_t kEstimateTilePages = 64;

/// What selection and pruning need of the workspace.
struct SelectSizes {
  std::int64_t seqs = 0;
  std::int64_t units = 0;  ///< (sequence, KV head) pairs, for the head sets; 0 for selection alone
  std::int64_t group = 0;  ///< G
  std::int64_t threads = 0;
  std::int64_t scratch = 0;     ///< int32 entries per thread
  std::int64_t slots = 0;       ///< sets of intermediate rows
  std::int64_t scores = 0;      ///< floats per slot
  std::int64_t estimates = 0;   ///< floats per slot and query head
  std::size_t query_bytes = 0;  ///< per slot, twice
};

/// Upper bound of the sizes of every op of the group.
[[nodiscard]] inline SelectSizes select_sizes(const StepCaps& caps, int threads) {
  const std::int64_t pages =
      (std::int64_t{caps.max_tokens} + caps.page_size - 1) / std::max(caps.page_size, 1);
  const std::int64_t candidate_tokens =
      std::min<std::int64_t>(caps.max_candidate_pages, pages) * caps.page_size;
  SelectSizes sizes;
  sizes.seqs = caps.max_seqs;
  sizes.units = std::int64_t{caps.max_seqs} * caps.num_kv_heads;
  sizes.group = caps.num_q_heads / std::max(caps.num_kv_heads, 1);
  sizes.threads = threads;
  sizes.scratch = std::max(select_scratch_entries(pages), prune_scratch_entries(candidate_tokens));
  sizes.slots = std::min(sizes.units, kUnitsPerThread * threads);
  sizes.scores = padded_row(pages);
  sizes.estimates = padded_row(candidate_tokens);
  sizes.query_bytes = prepared_query_bytes(caps.head_dim, static_cast<int>(sizes.group));
  return sizes;
}

/// The workspace of one call.
struct SelectPlan {
  std::int32_t* order = nullptr;    ///< [seqs] sequence numbers
  HeadSet* sets = nullptr;          ///< [units, G]
  std::int32_t* scratch = nullptr;  ///< [threads, scratch_stride]
  std::int64_t scratch_stride = 0;
  float* scores = nullptr;       ///< [slots, scores]
  float* estimates = nullptr;    ///< [slots, G, estimates]
  std::byte* queries = nullptr;  ///< [slots, 2, query_bytes]

  static SelectPlan carve(Arena& arena, const SelectSizes& sizes) {
    SelectPlan plan;
    plan.scratch_stride = padded_row(sizes.scratch);
    plan.order = arena.take<std::int32_t>("sequence order", sizes.seqs);
    plan.sets = arena.take<HeadSet>("head sets", sizes.units * sizes.group);
    plan.scratch = arena.take<std::int32_t>("keys", sizes.threads * plan.scratch_stride);
    plan.scores = arena.take<float>("page scores", sizes.slots * sizes.scores);
    plan.estimates = arena.take<float>("estimates", sizes.slots * sizes.group * sizes.estimates);
    plan.queries = arena.take<std::byte>(
        "queries", 2 * sizes.slots * static_cast<std::int64_t>(sizes.query_bytes));
    return plan;
  }

  [[nodiscard]] std::int32_t* scratch_of(int worker) const {
    return scratch + worker * scratch_stride;
  }

  /// Fills `order`: longest first, so that the last tasks handed out are short; ties in the order
  /// of the subset.
  void order_longest_first(const SeqSubset& seqs, const PagedKvView& kv) const {
    for (std::int32_t i = 0; i < seqs.count; ++i) order[i] = seqs.at(i);
    std::sort(order, order + seqs.count, [&](std::int32_t a, std::int32_t b) {
      return kv.seq_lens[a] != kv.seq_lens[b] ? kv.seq_lens[a] > kv.seq_lens[b] : a < b;
    });
  }
};

/// Pages of the longest sequence of a subset.
[[nodiscard]] inline std::int64_t longest_in_pages(const SeqSubset& seqs, const PagedKvView& kv) {
  std::int64_t pages = 0;
  for (std::int32_t i = 0; i < seqs.count; ++i) {
    pages = std::max<std::int64_t>(pages, kv.total_pages(seqs.at(i)));
  }
  return pages;
}

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_SELECT_PLAN_H_
