#include "support/step_buffers.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "support/random.h"

namespace twilight::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace

StepBuffers::StepBuffers(const OpCase& op_case, const PagedFixture& fixture)
    : case_(op_case),
      fixture_(fixture),
      num_kv_heads_(fixture.shape().num_kv_heads),
      has_subset_(op_case.subset) {
  const FixtureShape& shape = fixture.shape();
  const std::int64_t b = fixture.num_seqs();
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < b; ++i) {
    longest = std::max<std::int64_t>(longest, fixture.kv().seq_lens[i]);
    if (i % 2 == 0) subset_ids_.push_back(static_cast<std::int32_t>(i));
  }
  const std::int64_t most_pages = (longest + shape.page_size - 1) / shape.page_size;
  page_stride = most_pages + 3;
  candidate_stride = most_pages + 1;
  estimate_stride = (candidate_stride * shape.page_size + 15) / 16 * 16 + 16;
  kept_stride = candidate_stride * shape.page_size + 5;
  token_stride = longest + 7;
  out_seq_stride = std::int64_t{shape.num_q_heads} * shape.head_dim + 8;

  const auto rows_kv = static_cast<std::size_t>(b * shape.num_kv_heads);
  const auto rows_q = static_cast<std::size_t>(b * shape.num_q_heads);
  p.assign(rows_q, case_.policy.p);
  if (case_.policy.mixed_p) {
    Random random(hash64(case_.options.seed, 0x9));
    for (float& value : p) value = random.uniform(0.3F, 1.0F);
    if (!p.empty()) p.back() = 1.0F;
  }
  scores.assign(rows_kv * static_cast<std::size_t>(page_stride), kNan);
  log_masses.assign(rows_q * static_cast<std::size_t>(page_stride), kNan);
  exact_scores.assign(rows_q * static_cast<std::size_t>(token_stride), kNan);
  pages.assign(rows_kv * static_cast<std::size_t>(candidate_stride), kGarbage);
  page_counts.assign(rows_kv, kGarbage);
  estimates.assign(rows_q * static_cast<std::size_t>(estimate_stride), kNan);
  kept.assign(rows_kv * static_cast<std::size_t>(kept_stride), kGarbage);
  kept_counts.assign(rows_kv, kGarbage);
  head_counts.assign(rows_q, kGarbage);
  head_mass.assign(rows_q, kNan);
  tail_mass.assign(rows_q * static_cast<std::size_t>(candidate_stride), kNan);
  tail_shift.assign(rows_q, kNan);
  out.assign(static_cast<std::size_t>(b * out_seq_stride), kNan);
}

SeqSubset StepBuffers::seqs() const {
  if (!has_subset_) return {.ids = nullptr, .count = fixture_.num_seqs()};
  return {.ids = subset_ids_.data(), .count = static_cast<std::int32_t>(subset_ids_.size())};
}

void StepBuffers::set_subset(std::vector<std::int32_t> ids) {
  has_subset_ = true;
  subset_ids_ = std::move(ids);
}

bool StepBuffers::in_subset(std::int64_t seq) const {
  return !has_subset_ || std::binary_search(subset_ids_.begin(), subset_ids_.end(), seq);
}

bool StepBuffers::has_scores() const { return case_.policy.mode == SelectMode::kByScore; }

bool StepBuffers::has_estimates() const { return case_.policy.criterion != PruneCriterion::kNone; }

bool StepBuffers::has_tail() const { return case_.policy.tail; }

bool StepBuffers::has_far_tail() const {
  return has_tail() && has_scores() && case_.policy.far_tail;
}

ScorePagesParams StepBuffers::score_params() {
  return {.seqs = seqs(),
          .q = fixture_.q(),
          .kv = fixture_.kv(),
          .index = fixture_.index(),
          .scale = fixture_.scale(),
          .scores = scores.data(),
          .log_masses = has_far_tail() ? log_masses.data() : nullptr,
          .page_stride = page_stride};
}

ExactScoresParams StepBuffers::exact_scores_params() {
  return {.seqs = seqs(),
          .q = fixture_.q(),
          .kv = fixture_.kv(),
          .scale = fixture_.scale(),
          .scores = exact_scores.data(),
          .token_stride = token_stride};
}

SelectPagesParams StepBuffers::select_params() {
  return {.seqs = seqs(),
          .kv = fixture_.kv(),
          .mode = case_.policy.mode,
          .forced = case_.policy.forced,
          .fraction = case_.policy.fraction,
          .min_tokens = case_.policy.min_candidate_tokens,
          .max_tokens = case_.policy.max_candidate_tokens,
          .mass = case_.policy.mass,
          .mass_floor = case_.policy.mass_floor,
          .scores = has_scores() ? scores.data() : nullptr,
          .page_stride = page_stride,
          .pages = pages.data(),
          .page_counts = page_counts.data(),
          .candidate_stride = candidate_stride};
}

EstimateParams StepBuffers::estimate_params() {
  return {.seqs = seqs(),
          .q = fixture_.q(),
          .kv = fixture_.kv(),
          .index = fixture_.index(),
          .exact_keys = case_.policy.exact_keys,
          .scale = fixture_.scale(),
          .pages = pages.data(),
          .page_counts = page_counts.data(),
          .candidate_stride = candidate_stride,
          .estimates = estimates.data(),
          .estimate_stride = estimate_stride};
}

PruneParams StepBuffers::prune_params() {
  return {.seqs = seqs(),
          .kv = fixture_.kv(),
          .num_q_heads = fixture_.shape().num_q_heads,
          .criterion = case_.policy.criterion,
          .forced = case_.policy.forced,
          .min_tokens = case_.policy.min_tokens,
          .p = p.data(),
          .pages = pages.data(),
          .page_counts = page_counts.data(),
          .candidate_stride = candidate_stride,
          .estimates = has_estimates() ? estimates.data() : nullptr,
          .estimate_stride = estimate_stride,
          .kept = kept.data(),
          .kept_counts = kept_counts.data(),
          .kept_stride = kept_stride,
          .head_counts = head_counts.data(),
          .head_mass = head_mass.data(),
          .tail_mass = has_tail() ? tail_mass.data() : nullptr,
          .tail_shift = has_tail() ? tail_shift.data() : nullptr};
}

SelectAndPruneParams StepBuffers::select_and_prune_params() {
  return {.score = score_params(),
          .select = select_params(),
          .estimate = estimate_params(),
          .prune = prune_params()};
}

AttendDenseParams StepBuffers::attend_dense_params() {
  return {.seqs = seqs(),
          .q = fixture_.q(),
          .kv = fixture_.kv(),
          .scale = fixture_.scale(),
          .out = out.data(),
          .out_seq_stride = out_seq_stride};
}

AttendSparseParams StepBuffers::attend_sparse_params() {
  return {.seqs = seqs(),
          .q = fixture_.q(),
          .kv = fixture_.kv(),
          .scale = fixture_.scale(),
          .kept = kept.data(),
          .kept_counts = kept_counts.data(),
          .kept_stride = kept_stride,
          .tail = {.mass = has_tail() ? tail_mass.data() : nullptr,
                   .shift = has_tail() ? tail_shift.data() : nullptr,
                   .pages = pages.data(),
                   .page_counts = page_counts.data(),
                   .candidate_stride = candidate_stride,
                   .index = fixture_.index(),
                   .log_masses = has_far_tail() ? log_masses.data() : nullptr,
                   .scores = has_far_tail() ? scores.data() : nullptr,
                   .page_stride = page_stride,
                   .far_floor = case_.policy.far_floor},
          .out = out.data(),
          .out_seq_stride = out_seq_stride};
}

SparseStepParams StepBuffers::sparse_step_params() {
  return {.prune = select_and_prune_params(), .attend = attend_sparse_params()};
}

StepCaps StepBuffers::caps() const {
  const FixtureShape& shape = fixture_.shape();
  return {.max_seqs = fixture_.num_seqs(),
          .num_q_heads = shape.num_q_heads,
          .num_kv_heads = shape.num_kv_heads,
          .head_dim = shape.head_dim,
          .page_size = shape.page_size,
          .max_tokens = std::max<std::int32_t>(1, static_cast<std::int32_t>(token_stride - 7)),
          .max_candidate_pages = static_cast<std::int32_t>(candidate_stride)};
}

void StepBuffers::run_selection(Backend& backend, Workspace workspace) {
  if (has_scores()) backend.score_pages(score_params(), workspace);
  backend.select_pages(select_params(), workspace);
  if (has_estimates()) backend.estimate_scores(estimate_params(), workspace);
  estimates_before_prune = estimates;
  backend.prune_top_p(prune_params(), workspace);
}

std::span<const float> StepBuffers::scores_row(std::int64_t seq, std::int64_t kv_head) const {
  return std::span(scores).subspan(static_cast<std::size_t>(row(seq, kv_head) * page_stride),
                                   static_cast<std::size_t>(fixture_.kv().sealed_pages(seq)));
}

std::span<const std::int32_t> StepBuffers::candidate_pages(std::int64_t seq,
                                                           std::int64_t kv_head) const {
  const std::int64_t r = row(seq, kv_head);
  return std::span(pages).subspan(
      static_cast<std::size_t>(r * candidate_stride),
      static_cast<std::size_t>(page_counts[static_cast<std::size_t>(r)]));
}

std::span<const std::int32_t> StepBuffers::kept_tokens(std::int64_t seq,
                                                       std::int64_t kv_head) const {
  const std::int64_t r = row(seq, kv_head);
  return std::span(kept).subspan(
      static_cast<std::size_t>(r * kept_stride),
      static_cast<std::size_t>(kept_counts[static_cast<std::size_t>(r)]));
}

std::span<const float> StepBuffers::estimates_row(const std::vector<float>& values,
                                                  std::int64_t seq, std::int64_t q_head) const {
  const FixtureShape& shape = fixture_.shape();
  const std::int64_t kv_head = q_head / fixture_.group_size();
  const std::int64_t count =
      std::int64_t{page_counts[static_cast<std::size_t>(row(seq, kv_head))]} * shape.page_size;
  return std::span(values).subspan(
      static_cast<std::size_t>((seq * shape.num_q_heads + q_head) * estimate_stride),
      static_cast<std::size_t>(count));
}

std::span<const float> StepBuffers::log_mass_row(std::int64_t seq, std::int64_t q_head) const {
  const std::int64_t r = seq * fixture_.shape().num_q_heads + q_head;
  return std::span(log_masses)
      .subspan(static_cast<std::size_t>(r * page_stride),
               static_cast<std::size_t>(fixture_.kv().sealed_pages(seq)));
}

std::span<const float> StepBuffers::tail_row(std::int64_t seq, std::int64_t q_head) const {
  const std::int64_t r = seq * fixture_.shape().num_q_heads + q_head;
  const std::int64_t kv_row = row(seq, q_head / fixture_.group_size());
  return std::span(tail_mass).subspan(
      static_cast<std::size_t>(r * candidate_stride),
      static_cast<std::size_t>(page_counts[static_cast<std::size_t>(kv_row)]));
}

std::span<const float> StepBuffers::out_row(std::int64_t seq, std::int64_t q_head) const {
  const std::int64_t d = fixture_.shape().head_dim;
  return std::span(out).subspan(static_cast<std::size_t>(seq * out_seq_stride + q_head * d),
                                static_cast<std::size_t>(d));
}

TestWorkspace::TestWorkspace(const Backend& backend, const StepCaps& caps)
    : buffer_(backend.workspace_bytes(caps)) {
  if (buffer_.size() > 0) std::memset(buffer_.data(), 0xff, buffer_.size());
}

}  // namespace twilight::test
