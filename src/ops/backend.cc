#include "ops/backend.h"

#include "core/check.h"
#include "ops/validate.h"

namespace twilight {

Backend::~Backend() = default;
RecordedOps::~RecordedOps() = default;

std::unique_ptr<RecordedOps> Backend::record(const std::function<void()>& /*ops*/) {
  return nullptr;
}

void Backend::read_through(const std::byte* /*data*/, std::size_t /*bytes*/) {
  fail(ErrorCode::kUnsupported, "backend", name(), " has no memory of its own to read");
}

void Backend::append_kv(const AppendKvParams& params) {
  validate(params);
  do_append_kv(params);
}

void Backend::seal_pages(const SealPagesParams& params) {
  validate(params);
  do_seal_pages(params);
}

void Backend::copy_pages(const CopyPagesParams& params) {
  validate(params);
  do_copy_pages(params);
}

void Backend::score_pages(const ScorePagesParams& params, Workspace workspace) {
  validate("score_pages", workspace);
  validate(params);
  do_score_pages(params, workspace);
}

void Backend::exact_scores(const ExactScoresParams& params, Workspace workspace) {
  validate("exact_scores", workspace);
  validate(params);
  do_exact_scores(params, workspace);
}

void Backend::select_pages(const SelectPagesParams& params, Workspace workspace) {
  validate("select_pages", workspace);
  validate(params);
  do_select_pages(params, workspace);
}

void Backend::estimate_scores(const EstimateParams& params, Workspace workspace) {
  validate("estimate_scores", workspace);
  validate(params);
  do_estimate_scores(params, workspace);
}

void Backend::prune_top_p(const PruneParams& params, Workspace workspace) {
  validate("prune_top_p", workspace);
  validate(params);
  do_prune_top_p(params, workspace);
}

void Backend::select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  validate("select_and_prune", workspace);
  validate(params);
  do_select_and_prune(params, workspace);
}

void Backend::do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  const bool by_score = params.select.mode == SelectMode::kByScore;
  const bool prunes = params.prune.criterion != PruneCriterion::kNone;
  require(!by_score || (params.score.scores != nullptr && params.select.scores != nullptr),
          "select_and_prune", "scores, got null, accepted a buffer where the backend (", name(),
          ") has no fused form");
  require(!prunes || (params.estimate.estimates != nullptr && params.prune.estimates != nullptr),
          "select_and_prune", "estimates, got null, accepted a buffer where the backend (", name(),
          ") has no fused form");
  if (by_score) do_score_pages(params.score, workspace);
  do_select_pages(params.select, workspace);
  if (prunes) do_estimate_scores(params.estimate, workspace);
  do_prune_top_p(params.prune, workspace);
}

void Backend::sparse_step(const SparseStepParams& params, Workspace workspace) {
  validate("sparse_step", workspace);
  validate(params);
  do_sparse_step(params, workspace);
}

void Backend::do_sparse_step(const SparseStepParams& params, Workspace workspace) {
  do_select_and_prune(params.prune, workspace);
  do_attend_sparse(params.attend, workspace);
}

void Backend::attend_dense(const AttendDenseParams& params, Workspace workspace) {
  validate("attend_dense", workspace);
  validate(params);
  do_attend_dense(params, workspace);
}

void Backend::attend_sparse(const AttendSparseParams& params, Workspace workspace) {
  validate("attend_sparse", workspace);
  validate(params);
  do_attend_sparse(params, workspace);
}

void Backend::attend_prefill(const AttendPrefillParams& params) {
  validate(params);
  do_attend_prefill(params);
}

void Backend::linear(const LinearParams& params) {
  validate(params);
  do_linear(params);
}

void Backend::rms_norm(const RmsNormParams& params) {
  validate(params);
  do_rms_norm(params);
}

void Backend::rope(const RopeParams& params) {
  validate(params);
  do_rope(params);
}

void Backend::silu_mul(const SiluMulParams& params) {
  validate(params);
  do_silu_mul(params);
}

void Backend::embed(const EmbedParams& params) {
  validate(params);
  do_embed(params);
}

void Backend::rotation(const RotationParams& params) {
  validate(params);
  do_rotation(params);
}

void Backend::argmax(const ArgmaxParams& params) {
  validate(params);
  do_argmax(params);
}

void Backend::sample_rows(const SampleRowsParams& params) {
  validate(params);
  do_sample_rows(params);
}

void Backend::project(const ProjectParams& params) {
  validate(params);
  do_project(params);
}

void Backend::feed_forward(const FeedForwardParams& params) {
  validate(params);
  do_feed_forward(params);
}

void Backend::advance_layer(const AdvanceLayerParams& params) {
  validate(params);
  do_advance_layer(params);
}

void Backend::count_tail(const CountTailParams& params, Workspace workspace) {
  validate("count_tail", workspace);
  validate(params);
  do_count_tail(params, workspace);
}

void Backend::do_project(const ProjectParams& params) {
  do_rms_norm(params.norm);
  do_linear(params.q);
  do_linear(params.k);
  do_linear(params.v);
  if (params.q_norm.weight != nullptr) do_rms_norm(params.q_norm);
  if (params.k_norm.weight != nullptr) do_rms_norm(params.k_norm);
  do_rope(params.q_rope);
  do_rope(params.k_rope);
}

void Backend::do_feed_forward(const FeedForwardParams& params) {
  do_rms_norm(params.norm);
  do_linear(params.gate);
  do_linear(params.up);
  do_silu_mul({params.gate.y, params.up.y, params.gate.y,
               std::int64_t{params.gate.num_rows} * params.gate.weight.rows});
  do_linear(params.down);
}

void Backend::do_advance_layer(const AdvanceLayerParams& params) {
  do_linear(params.out);
  do_feed_forward(params.feed);
  if (params.next != nullptr) do_project(*params.next);
  if (params.append != nullptr) do_append_kv(*params.append);
}

}  // namespace twilight
