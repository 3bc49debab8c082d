#ifndef TWILIGHT_TESTS_SUPPORT_STEP_BUFFERS_H_
#define TWILIGHT_TESTS_SUPPORT_STEP_BUFFERS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "ops/backend.h"
#include "support/cases.h"

namespace twilight::test {

/// Outputs and intermediates of one decode step of a case, with the parameter blocks that point at
/// them. Starts as garbage: NaN in floats, kGarbage in integers, also between and behind rows. The
/// fixture must outlive it. Fill it with one backend op by op, or copy stages from another
/// StepBuffers of the same case so that an op under test starts from reference inputs.
class StepBuffers {
 public:
  static constexpr std::int32_t kGarbage = 0x7f7f7f7f;

  StepBuffers(const OpCase& op_case, const PagedFixture& fixture);
  StepBuffers(const StepBuffers&) = delete;
  StepBuffers& operator=(const StepBuffers&) = delete;

  [[nodiscard]] ScorePagesParams score_params();
  [[nodiscard]] ExactScoresParams exact_scores_params();
  [[nodiscard]] SelectPagesParams select_params();
  [[nodiscard]] EstimateParams estimate_params();
  [[nodiscard]] PruneParams prune_params();
  [[nodiscard]] SelectAndPruneParams select_and_prune_params();
  [[nodiscard]] AttendDenseParams attend_dense_params();
  [[nodiscard]] AttendSparseParams attend_sparse_params();
  [[nodiscard]] SparseStepParams sparse_step_params();
  [[nodiscard]] StepCaps caps() const;

  /// Whether the case needs page scores, or estimates, at all.
  [[nodiscard]] bool has_scores() const;
  [[nodiscard]] bool has_estimates() const;
  [[nodiscard]] bool has_tail() const;
  [[nodiscard]] bool has_far_tail() const;
  /// Runs score, select, estimate and prune one after the other, as far as the case has them.
  /// `estimates_before_prune` then holds what prune was given.
  void run_selection(Backend& backend, Workspace workspace);

  [[nodiscard]] SeqSubset seqs() const;
  /// Works on these sequences (ascending) instead of the case's.
  void set_subset(std::vector<std::int32_t> ids);
  [[nodiscard]] bool in_subset(std::int64_t seq) const;
  [[nodiscard]] std::int64_t row(std::int64_t seq, std::int64_t kv_head) const {
    return seq * num_kv_heads_ + kv_head;
  }
  [[nodiscard]] std::span<const float> scores_row(std::int64_t seq, std::int64_t kv_head) const;
  [[nodiscard]] std::span<const std::int32_t> candidate_pages(std::int64_t seq,
                                                              std::int64_t kv_head) const;
  [[nodiscard]] std::span<const std::int32_t> kept_tokens(std::int64_t seq,
                                                          std::int64_t kv_head) const;
  /// The candidate slots of one query head: page_counts * P entries.
  [[nodiscard]] std::span<const float> estimates_row(const std::vector<float>& estimates,
                                                     std::int64_t seq, std::int64_t q_head) const;
  /// A query head's log masses of the sealed pages, with a far tail.
  [[nodiscard]] std::span<const float> log_mass_row(std::int64_t seq, std::int64_t q_head) const;
  /// What a query head dropped of each candidate page: page_counts entries.
  [[nodiscard]] std::span<const float> tail_row(std::int64_t seq, std::int64_t q_head) const;
  [[nodiscard]] std::span<const float> out_row(std::int64_t seq, std::int64_t q_head) const;

  std::int64_t page_stride = 0;
  std::int64_t candidate_stride = 0;
  std::int64_t estimate_stride = 0;
  std::int64_t kept_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t out_seq_stride = 0;
  std::vector<float> p;                       ///< [B, Hq]
  std::vector<float> scores;                  ///< [B, Hkv, page_stride]
  std::vector<float> log_masses;              ///< [B, Hq, page_stride]
  std::vector<float> exact_scores;            ///< [B, Hq, token_stride]
  std::vector<std::int32_t> pages;            ///< [B, Hkv, candidate_stride]
  std::vector<std::int32_t> page_counts;      ///< [B, Hkv]
  std::vector<float> estimates;               ///< [B, Hq, estimate_stride]
  std::vector<float> estimates_before_prune;  ///< the same, filled by run_selection
  std::vector<std::int32_t> kept;             ///< [B, Hkv, kept_stride]
  std::vector<std::int32_t> kept_counts;      ///< [B, Hkv]
  std::vector<std::int32_t> head_counts;      ///< [B, Hq]
  std::vector<float> head_mass;               ///< [B, Hq]
  std::vector<float> tail_mass;               ///< [B, Hq, candidate_stride]
  std::vector<float> tail_shift;              ///< [B, Hq]
  std::vector<float> out;                     ///< [B, Hq, D]

 private:
  const OpCase& case_;
  const PagedFixture& fixture_;
  std::int64_t num_kv_heads_;
  bool has_subset_;
  std::vector<std::int32_t> subset_ids_;
};

/// Workspace of a backend for a case's caps, filled with 0xff.
class TestWorkspace {
 public:
  TestWorkspace(const Backend& backend, const StepCaps& caps);
  [[nodiscard]] Workspace get() { return {.data = buffer_.data(), .bytes = buffer_.size()}; }

 private:
  Buffer buffer_;
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_STEP_BUFFERS_H_
