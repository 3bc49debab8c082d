#include "sparse/decode_step.h"

#include <algorithm>
#include <cmath>

#include "core/buffer.h"
#include "core/check.h"
#include "sparse/audit.h"
#include "sparse/decode_step_scratch.h"

namespace twilight {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

// Longest candidate list any sequence of at most `max_tokens` tokens can have, in pages.
std::int32_t max_candidate_pages(const SparsePolicy& policy, SelectMode mode,
                                 const StepCaps& caps) {
  const std::int64_t page_size = caps.page_size;
  const std::int64_t all = (std::int64_t{caps.max_tokens} + page_size - 1) / page_size;
  if (mode == SelectMode::kAll) return static_cast<std::int32_t>(all);
  const std::int64_t forced =
      (policy.sink_tokens + page_size - 1) / page_size + policy.recent_pages + 1;
  if (mode == SelectMode::kForcedOnly) return static_cast<std::int32_t>(std::min(all, forced));
  SelectPagesParams select;
  select.kv.page_size = caps.page_size;
  select.fraction = policy.candidate_fraction;
  select.min_tokens = policy.min_candidates;
  select.max_tokens = policy.max_candidates;
  return static_cast<std::int32_t>(
      std::min(all, std::max(select.budget_pages(caps.max_tokens), forced)));
}

}  // namespace

IndexFormat index_format_of(const SparsePolicy& policy) {
  if (policy.is_dense()) return {.summary = SummaryKind::kNone, .key_bits = 0};
  const bool estimates = policy.prune && policy.key_bits < 16;
  IndexFormat format;
  format.summary = make_selector(policy)->summary();
  if (format.summary == SummaryKind::kLabels) format.label_channels = policy.num_labels;
  format.key_bits = estimates ? policy.key_bits : 0;
  format.value_bits = policy.prune && policy.tail ? 4 : 0;
  return format;
}

IndexFormat index_format_of(const SparsePolicy& policy, const Backend& backend,
                            std::int32_t head_dim) {
  IndexFormat format = index_format_of(policy);
  IndexFormat ordered = format;
  ordered.layout = backend.index_layout();
  return head_dim % head_dim_unit(ordered) == 0 ? ordered : format;
}

DecodeStep::Scratch DecodeStep::carve(std::byte* lists, void* base, std::size_t bytes) const {
  Arena arena = base == nullptr ? Arena() : Arena(base, bytes);
  Arena apart = lists == nullptr ? Arena() : Arena(lists, lists_bytes_);
  Arena& first = lists == nullptr ? arena : apart;
  Scratch s{};
  const std::int64_t seqs = caps_.max_seqs;
  const std::int64_t kv_units = seqs * caps_.num_kv_heads;
  const std::int64_t q_units = seqs * caps_.num_q_heads;
  if (selector_ != nullptr) {
    s.page_stride = (std::int64_t{caps_.max_tokens} + caps_.page_size - 1) / caps_.page_size;
    s.slot_stride = round_up(std::int64_t{caps_.max_candidate_pages} * caps_.page_size, 16);
    const bool fused =
        policy_.prune && backend_.has_fused_select_and_prune() &&
        (selector_->mode() != SelectMode::kByScore || selector_->scores_in_backend());
    const bool tail = policy_.prune && policy_.tail;
    s.page_counts = first.take<std::int32_t>("candidate counts", kv_units);
    s.kept_counts = first.take<std::int32_t>("kept counts", kv_units);
    s.head_counts = first.take<std::int32_t>("head counts", q_units);
    s.head_mass = first.take<float>("head mass", q_units);
    if (tail) s.tail_counts = first.take<std::int32_t>("tail counts", kv_units);
    s.counts_bytes = first.used_bytes();
    s.kept = arena.take<std::int32_t>("kept", kv_units * s.slot_stride);
    s.kept_bytes = arena.used_bytes();
    if (tail) {
      s.tail_shift = arena.take<float>("tail shift", q_units);
      s.tail_mass = arena.take<float>("tail mass", q_units * caps_.max_candidate_pages);
    }
    s.pages = arena.take<std::int32_t>("candidate pages", kv_units * caps_.max_candidate_pages);
    if (selector_->mode() == SelectMode::kByScore) {
      s.scores = arena.take<float>("scores", kv_units * s.page_stride);
    }
    if (tail && policy_.far_tail) {
      s.log_masses = arena.take<float>("log masses", q_units * s.page_stride);
    }
    if (policy_.prune && !fused) {
      s.estimates = arena.take<float>("estimates", q_units * s.slot_stride);
    }
    s.selector = arena.take<float>("selector", q_units * selector_->scratch_floats_per_token() *
                                                   std::int64_t{caps_.max_tokens});
  }
  s.ops.bytes = backend_.workspace_bytes(caps_);
  s.ops.data = arena.take<std::byte>("ops", static_cast<std::int64_t>(s.ops.bytes));
  s.used_bytes = arena.used_bytes();
  return s;
}

DecodeStep::Scratch DecodeStep::host_lists(const Scratch& scratch, Workspace workspace,
                                           bool audit) {
  DeviceMemory& memory = backend_.memory();
  if (memory.is_host()) return scratch;
  const std::size_t bytes = audit ? scratch.kept_bytes : scratch.counts_bytes;
  // The same places in a copy as long as the workspace: untouched pages of it cost nothing.
  if (lists_.size() < workspace_bytes_) lists_ = Buffer(workspace_bytes_);
  memory.download(lists_.data(), workspace.data, bytes);
  return carve(nullptr, lists_.data(), lists_.size());
}

DecodeStep::DecodeStep(Backend& backend, const SparsePolicy& policy, StepCaps shape,
                       DType cache_dtype)
    : backend_(backend), policy_(policy), caps_(shape) {
  validate_policy(policy_);
  const auto positive = [](const char* name, std::int32_t value) {
    require(value >= 1, "decode_step", name, ", got ", value, ", accepted 1 or more");
  };
  positive("batch size", shape.max_seqs);
  positive("kv heads", shape.num_kv_heads);
  positive("query heads", shape.num_q_heads);
  positive("head_dim", shape.head_dim);
  positive("max_tokens", shape.max_tokens);
  require(shape.page_size >= 1 && shape.page_size <= 256, "decode_step", "page_size, got ",
          shape.page_size, ", accepted 1 to 256");
  require(shape.num_q_heads % shape.num_kv_heads == 0, "decode_step", "query heads, got ",
          shape.num_q_heads, ", accepted multiples of the ", shape.num_kv_heads, " KV heads");
  if (!policy_.is_dense()) {
    selector_ = make_selector(policy_);
    caps_.max_candidate_pages = max_candidate_pages(policy_, selector_->mode(), caps_);
  } else {
    caps_.max_candidate_pages = 0;
  }
  const Support support =
      backend_.supports(caps_, cache_dtype, index_format_of(policy_, backend_, caps_.head_dim));
  if (!support) fail(ErrorCode::kUnsupported, "decode_step", backend_.name(), ": ", support.reason);
  const Scratch sizes = carve(nullptr, nullptr, 0);
  workspace_bytes_ = sizes.used_bytes;
  lists_bytes_ = align_up(sizes.counts_bytes);
  const auto seqs = static_cast<std::size_t>(caps_.max_seqs);
  dense_ids_.resize(seqs);
  sparse_ids_.resize(seqs);
  paths_.resize(seqs);
  p_.resize(seqs * static_cast<std::size_t>(caps_.num_q_heads));
}

DecodeStep::~DecodeStep() = default;

StepPath DecodeStep::path_of(std::int32_t layer, std::int32_t num_tokens, float p) const {
  if (selector_ == nullptr) return StepPath::kDensePolicy;
  if (layer < policy_.dense_layers) return StepPath::kDenseLayer;
  if (num_tokens <= std::max(policy_.dense_below_tokens, 0)) return StepPath::kDenseShort;
  const ForcedTokens forced{policy_.sink_tokens, policy_.recent_pages};
  const std::int64_t recent_begin =
      (std::int64_t{num_tokens} / caps_.page_size - forced.recent_pages) * caps_.page_size;
  if (forced.sink_tokens >= recent_begin) return StepPath::kDenseAllForced;
  if (selector_->mode() == SelectMode::kAll && (!policy_.prune || p >= 1)) {
    return StepPath::kDenseFullMass;
  }
  return StepPath::kSparse;
}

void DecodeStep::run(const DecodeStepParams& params, Workspace workspace,
                     std::span<LayerStats> stats, bool audit) {
  const std::int32_t num_seqs = params.kv.num_seqs;
  require(num_seqs <= caps_.max_seqs, "decode_step", "batch size, got ", num_seqs,
          ", accepted up to ", caps_.max_seqs);
  require(stats.empty() || stats.size() == static_cast<std::size_t>(num_seqs), "decode_step",
          "stats entries, got ", stats.size(), ", accepted 0 or ", num_seqs);
  require(workspace.data != nullptr || workspace_bytes_ == 0, "decode_step",
          "workspace, got null, accepted ", workspace_bytes_, " bytes");
  require(params.lists == nullptr || stats.empty(), "decode_step",
          "stats entries with lists of their own, got ", stats.size(), ", accepted 0");
  const Scratch scratch = carve(params.lists, workspace.data, workspace.bytes);
  const float scale = 1.0F / std::sqrt(static_cast<float>(params.kv.head_dim));
  const float layer_p = policy_.p_of_layer(params.layer);

  SeqSubset dense{dense_ids_.data(), 0};
  SeqSubset sparse{sparse_ids_.data(), 0};
  for (std::int32_t seq = 0; seq < num_seqs; ++seq) {
    const std::int32_t n = params.kv.host_len(seq);
    require(n <= caps_.max_tokens, "decode_step", "sequence length, got ", n,
            " tokens, accepted up to ", caps_.max_tokens);
    const float p = params.p != nullptr ? params.p[seq] : layer_p;
    const auto at = static_cast<std::size_t>(seq);
    paths_[at] = path_of(params.layer, n, p);
    if (is_dense(paths_[at])) {
      dense_ids_[static_cast<std::size_t>(dense.count++)] = seq;
    } else {
      sparse_ids_[static_cast<std::size_t>(sparse.count++)] = seq;
      std::fill_n(p_.data() + std::int64_t{seq} * caps_.num_q_heads, caps_.num_q_heads, p);
    }
  }
  if (dense.count > 0) {
    backend_.attend_dense({dense, params.q, params.kv, scale, params.out, params.out_seq_stride},
                          scratch.ops);
  }
  if (sparse.count > 0) {
    const bool wants_lists = params.lists != nullptr || !stats.empty();
    run_sparse(params, sparse, scratch, wants_lists);
    if (scratch.tail_counts != nullptr && wants_lists) {
      CountTailParams count;
      count.seqs = sparse;
      count.kv = params.kv;
      count.num_q_heads = caps_.num_q_heads;
      count.tail = tail_params(params, scratch);
      count.counts = scratch.tail_counts;
      backend_.count_tail(count, scratch.ops);
    }
  }
  if (stats.empty()) return;
  const Scratch lists = sparse.count > 0 ? host_lists(scratch, workspace, audit) : scratch;
  for (std::int32_t seq = 0; seq < num_seqs; ++seq) {
    LayerStats& out = stats[static_cast<std::size_t>(seq)];
    fill_stats(params, lists, seq, paths_[static_cast<std::size_t>(seq)], out);
    if (audit) {
      out.true_mass.assign(static_cast<std::size_t>(caps_.num_q_heads), 1.0F);
      if (!is_dense(out.path)) {
        const std::int64_t unit = std::int64_t{seq} * caps_.num_kv_heads;
        audit_true_mass(backend_, params.q, params.kv, scale, seq,
                        lists.kept + unit * lists.slot_stride, lists.kept_counts + unit,
                        lists.slot_stride, scratch.ops, out.true_mass);
      }
    } else {
      out.true_mass.clear();
    }
  }
}

TailParams DecodeStep::tail_params(const DecodeStepParams& params, const Scratch& s) const {
  TailParams tail;
  tail.mass = s.tail_mass;
  tail.shift = s.tail_shift;
  tail.pages = s.pages;
  tail.page_counts = s.page_counts;
  tail.candidate_stride = caps_.max_candidate_pages;
  tail.index = params.index;
  tail.log_masses = s.log_masses;
  tail.scores = s.scores;
  tail.page_stride = s.page_stride;
  tail.far_floor = policy_.far_floor;
  return tail;
}

void DecodeStep::run_sparse(const DecodeStepParams& params, const SeqSubset& seqs, const Scratch& s,
                            bool wants_lists) {
  const float scale = 1.0F / std::sqrt(static_cast<float>(params.kv.head_dim));
  const ForcedTokens forced{policy_.sink_tokens, policy_.recent_pages};
  SparseStepParams whole;
  whole.wants_lists = wants_lists;
  SelectAndPruneParams& step = whole.prune;
  step.score.seqs = seqs;
  step.score.q = params.q;
  step.score.kv = params.kv;
  step.score.index = params.index;
  step.score.scale = scale;
  step.score.scores = s.scores;
  step.score.log_masses = s.log_masses;
  step.score.page_stride = s.page_stride;
  step.select.seqs = seqs;
  step.select.kv = params.kv;
  step.select.mode = selector_->mode();
  step.select.forced = forced;
  step.select.fraction = policy_.candidate_fraction;
  step.select.min_tokens = policy_.min_candidates;
  step.select.max_tokens = policy_.max_candidates;
  step.select.mass = policy_.candidate_mass;
  step.select.mass_floor = policy_.min_candidates;
  step.select.scores = s.scores;
  step.select.page_stride = s.page_stride;
  step.select.pages = s.pages;
  step.select.page_counts = s.page_counts;
  step.select.candidate_stride = caps_.max_candidate_pages;

  EstimateParams& estimate = step.estimate;
  estimate.seqs = seqs;
  estimate.q = params.q;
  estimate.kv = params.kv;
  estimate.index = params.index;
  estimate.exact_keys = policy_.key_bits == 16;
  estimate.scale = scale;
  estimate.pages = s.pages;
  estimate.page_counts = s.page_counts;
  estimate.candidate_stride = caps_.max_candidate_pages;
  estimate.estimates = s.estimates;
  estimate.estimate_stride = s.slot_stride;

  PruneParams& prune = step.prune;
  prune.seqs = seqs;
  prune.kv = params.kv;
  prune.num_q_heads = caps_.num_q_heads;
  prune.criterion = !policy_.prune                    ? PruneCriterion::kNone
                    : policy_.criterion == "per_head" ? PruneCriterion::kPerHead
                                                      : PruneCriterion::kGroupMean;
  prune.forced = forced;
  prune.min_tokens = policy_.min_tokens;
  prune.p = p_.data();
  prune.pages = s.pages;
  prune.page_counts = s.page_counts;
  prune.candidate_stride = caps_.max_candidate_pages;
  prune.estimates = s.estimates;
  prune.estimate_stride = s.slot_stride;
  prune.kept = s.kept;
  prune.kept_counts = s.kept_counts;
  prune.kept_stride = s.slot_stride;
  prune.head_counts = s.head_counts;
  prune.head_mass = s.head_mass;
  prune.tail_mass = s.tail_mass;
  prune.tail_shift = s.tail_shift;

  AttendSparseParams& attend = whole.attend;
  attend.seqs = seqs;
  attend.q = params.q;
  attend.kv = params.kv;
  attend.scale = scale;
  attend.kept = s.kept;
  attend.kept_counts = s.kept_counts;
  attend.kept_stride = s.slot_stride;
  attend.tail = tail_params(params, s);
  attend.out = params.out;
  attend.out_seq_stride = params.out_seq_stride;

  if (policy_.prune && s.estimates == nullptr) {
    backend_.sparse_step(whole, s.ops);
  } else {
    if (step.select.mode == SelectMode::kByScore) {
      selector_->score(backend_, step.score, s.selector, caps_.max_tokens, s.ops);
    }
    backend_.select_pages(step.select, s.ops);
    if (policy_.prune) backend_.estimate_scores(estimate, s.ops);
    backend_.prune_top_p(prune, s.ops);
    backend_.attend_sparse(attend, s.ops);
  }
}

}  // namespace twilight
