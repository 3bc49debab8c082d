#include "ops/validate.h"

#include <algorithm>
#include <cmath>

#include "core/buffer.h"
#include "core/check.h"
#include "ops/backend.h"
#include "ops/field_checks.h"

namespace twilight {
namespace {

/// Length of the longest list select_pages can write for a sequence of n tokens.
std::int64_t candidate_pages(const SelectPagesParams& params, std::int64_t n) {
  const std::int64_t page_size = params.kv.page_size;
  const std::int64_t total = (n + page_size - 1) / page_size;
  if (params.mode == SelectMode::kAll) return total;
  const std::int64_t sinks =
      std::min(total, (params.forced.sink_tokens + page_size - 1) / page_size);
  const std::int64_t recent_begin =
      std::clamp<std::int64_t>(n / page_size - params.forced.recent_pages, sinks, total);
  const std::int64_t forced = sinks + total - recent_begin;
  if (params.mode == SelectMode::kForcedOnly) return forced;
  return std::max(forced, std::min(total, params.budget_pages(n)));
}

void score_pages(const ScorePagesParams& params, bool scores_needed) {
  const FieldChecks check{"score_pages"};
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  if (params.seqs.count == 0) return;
  check.table(params.seqs, params.kv);
  check.query(params.q, params.kv);
  check.format(params.index.format, params.kv);
  require(params.index.format.summary != SummaryKind::kNone, check.op,
          "index.format.summary, got none, accepted a kind with records");
  check.summaries(params.index, params.kv);
  check.page_params(params.index, params.kv);
  check.scale(params.scale);
  if (scores_needed) check.pointer("scores", params.scores);
  if (params.scores != nullptr || params.log_masses != nullptr) {
    check.page_stride(params.page_stride, params.seqs, params.kv);
  }
  require(params.log_masses == nullptr || num_centroids(params.index.format.summary) > 0, check.op,
          "log_masses, got a buffer with a summary that gives none, accepted null");
}

void select_pages(const SelectPagesParams& params, bool scores_needed) {
  const FieldChecks check{"select_pages"};
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  check.in_range("mode", static_cast<std::int64_t>(params.mode), 0, 2);
  check.forced(params.forced);
  if (params.seqs.count == 0) return;
  check.lengths(params.seqs, params.kv);
  if (params.mode == SelectMode::kByScore) {
    require(params.fraction >= 0 && params.fraction <= 1, check.op, "fraction, got ",
            params.fraction, ", accepted 0 to 1");
    check.at_least("min_tokens", params.min_tokens, 0);
    check.at_least("max_tokens", params.max_tokens, params.min_tokens);
    require(params.mass >= 0 && params.mass <= 1, check.op, "mass, got ", params.mass,
            ", accepted 0 to 1");
    check.at_least("mass_floor", params.mass_floor, 0);
    if (scores_needed) check.pointer("scores", params.scores);
    if (params.scores != nullptr) check.page_stride(params.page_stride, params.seqs, params.kv);
  }
  check.candidates(params.pages, params.page_counts, params.candidate_stride);
  std::int64_t pages = 0;
  for (std::int32_t i = 0; i < params.seqs.count; ++i) {
    pages = std::max(pages, candidate_pages(params, params.kv.host_len(params.seqs.at(i))));
  }
  check.at_least("candidate_stride", params.candidate_stride, pages);
}

void estimate_scores(const EstimateParams& params, bool estimates_needed) {
  const FieldChecks check{"estimate_scores"};
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  if (params.seqs.count == 0) return;
  check.k(params.kv);
  check.table(params.seqs, params.kv);
  check.query(params.q, params.kv);
  if (!params.exact_keys) {
    check.format(params.index.format, params.kv);
    require(params.index.format.key_bits != 0, check.op,
            "index.format.key_bits, got 0, accepted 2, 4 or 8, or any with exact_keys");
    check.estimates(params.index, params.kv);
    if (params.index.format.key_bits == 2) {
      if (!params.index.format.own_centre()) check.summaries(params.index, params.kv);
      check.page_params(params.index, params.kv);
    }
  }
  check.scale(params.scale);
  check.candidates(params.pages, params.page_counts, params.candidate_stride);
  if (estimates_needed) check.pointer("estimates", params.estimates);
  if (params.estimates != nullptr) {
    check.estimate_rows(params.estimate_stride, params.candidate_stride, params.kv);
  }
}

void prune_top_p(const PruneParams& params, bool estimates_needed) {
  const FieldChecks check{"prune_top_p"};
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  check.heads("num_q_heads", params.num_q_heads, params.kv);
  check.in_range("criterion", static_cast<std::int64_t>(params.criterion), 0, 2);
  check.forced(params.forced);
  check.at_least("min_tokens", params.min_tokens, 0);
  if (params.seqs.count == 0) return;
  check.lengths(params.seqs, params.kv);
  check.candidates(params.pages, params.page_counts, params.candidate_stride);
  if (params.criterion != PruneCriterion::kNone) {
    check.pointer("p", params.p);
    for (std::int64_t i = 0; i < params.seqs.count; ++i) {
      const float* p = params.p + std::int64_t{params.seqs.at(i)} * params.num_q_heads;
      for (std::int32_t head = 0; head < params.num_q_heads; ++head) {
        require(p[head] > 0 && p[head] <= 1, check.op, "p, got ", p[head],
                ", accepted numbers above 0 up to 1");
      }
    }
    if (estimates_needed) check.pointer("estimates", params.estimates);
    if (params.estimates != nullptr) {
      check.estimate_rows(params.estimate_stride, params.candidate_stride, params.kv);
    }
  }
  check.pointer("kept", params.kept);
  check.pointer("kept_counts", params.kept_counts);
  check.at_least("kept_stride", params.kept_stride, params.candidate_stride * params.kv.page_size);
  check.pointer("head_counts", params.head_counts);
  check.pointer("head_mass", params.head_mass);
  if (params.tail_mass == nullptr) return;
  require(params.criterion != PruneCriterion::kNone, check.op,
          "tail_mass, got a buffer with criterion kNone, accepted null");
  check.pointer("tail_shift", params.tail_shift);
}

// What dense and sparse attention share; false where there is no sequence and nothing more
// to check.
template <typename Params>
bool check_attention(const FieldChecks& check, const Params& params) {
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  if (params.seqs.count == 0) return false;
  check.k(params.kv);
  check.v(params.kv);
  check.table(params.seqs, params.kv);
  check.query(params.q, params.kv);
  check.scale(params.scale);
  return true;
}

}  // namespace

void validate(const char* op, const Workspace& workspace) {
  if (workspace.bytes == 0) return;
  require(workspace.data != nullptr &&
              reinterpret_cast<std::uintptr_t>(workspace.data) % kBufferAlignment == 0,
          op, "workspace, got ", static_cast<const void*>(workspace.data), ", accepted ",
          kBufferAlignment, "-byte aligned pointers");
}

void validate(const AppendKvParams& params) {
  const FieldChecks check{"append_kv"};
  check.shape(params.kv);
  check.at_least("num_tokens", params.num_tokens, 0);
  if (params.num_tokens == 0) return;
  check.k(params.kv);
  check.v(params.kv);
  check.pointer("k", params.k);
  check.pointer("v", params.v);
  check.pointer("slots", params.slots);
  if (params.num_tokens == 1) return;
  const std::int64_t row = std::int64_t{params.kv.num_kv_heads} * params.kv.head_dim;
  check.at_least("k_token_stride", params.k_token_stride, row);
  check.at_least("v_token_stride", params.v_token_stride, row);
}

void validate(const SealPagesParams& params) {
  const FieldChecks check{"seal_pages"};
  check.shape(params.kv);
  check.at_least("num_pages", params.num_pages, 0);
  if (params.num_pages == 0) return;
  check.k(params.kv);
  check.index(params.index, params.kv);
  check.pointer("pages", params.pages);
}

void validate(const CopyPagesParams& params) {
  const FieldChecks check{"copy_pages"};
  check.shape(params.kv);
  check.at_least("num_pages", params.num_pages, 0);
  if (params.num_pages == 0) return;
  check.k(params.kv);
  check.v(params.kv);
  check.index(params.index, params.kv);
  check.pointer("from", params.from);
  check.pointer("to", params.to);
}

void validate(const ScorePagesParams& params) { score_pages(params, true); }

void validate(const ExactScoresParams& params) {
  const FieldChecks check{"exact_scores"};
  check.shape(params.kv);
  check.subset(params.seqs, params.kv);
  if (params.seqs.count == 0) return;
  check.k(params.kv);
  check.table(params.seqs, params.kv);
  check.query(params.q, params.kv);
  check.scale(params.scale);
  check.pointer("scores", params.scores);
  std::int64_t longest = 0;
  for (std::int32_t i = 0; i < params.seqs.count; ++i) {
    longest = std::max<std::int64_t>(longest, params.kv.host_len(params.seqs.at(i)));
  }
  check.at_least("token_stride", params.token_stride, longest);
}

void validate(const SelectPagesParams& params) { select_pages(params, true); }

void validate(const EstimateParams& params) { estimate_scores(params, true); }

void validate(const PruneParams& params) { prune_top_p(params, true); }

void validate(const SelectAndPruneParams& params) {
  if (params.select.mode == SelectMode::kByScore) score_pages(params.score, false);
  select_pages(params.select, false);
  if (params.prune.criterion != PruneCriterion::kNone) estimate_scores(params.estimate, false);
  prune_top_p(params.prune, false);
}

void validate(const SparseStepParams& params) {
  validate(params.prune);
  validate(params.attend);
}

void validate(const AttendDenseParams& params) {
  const FieldChecks check{"attend_dense"};
  if (!check_attention(check, params)) return;
  check.output(params.out, params.out_seq_stride, params.q, params.kv);
}

void validate(const AttendSparseParams& params) {
  const FieldChecks check{"attend_sparse"};
  if (!check_attention(check, params)) return;
  check.pointer("kept", params.kept);
  check.pointer("kept_counts", params.kept_counts);
  check.at_least("kept_stride", params.kept_stride, 0);
  if (params.tail.mass != nullptr) {
    check.pointer("tail.shift", params.tail.shift);
    check.pointer("tail.pages", params.tail.pages);
    check.pointer("tail.page_counts", params.tail.page_counts);
    check.at_least("tail.candidate_stride", params.tail.candidate_stride, 0);
    check.format(params.tail.index.format, params.kv);
    require(params.tail.index.format.value_bits != 0, check.op,
            "tail.index.format.value_bits, got 0, accepted 4");
    check.value_means(params.tail.index, params.kv);
    check.page_params(params.tail.index, params.kv);
    if (params.tail.log_masses != nullptr) {
      check.pointer("tail.scores", params.tail.scores);
      check.page_stride(params.tail.page_stride, params.seqs, params.kv);
      require(params.tail.far_floor >= 0, check.op, "tail.far_floor, got ", params.tail.far_floor,
              ", accepted 0 or more");
    }
  }
  check.output(params.out, params.out_seq_stride, params.q, params.kv);
}

void validate(const AttendPrefillParams& params) {
  const FieldChecks check{"attend_prefill"};
  check.shape(params.kv);
  check.at_least("num_tokens", params.num_tokens, 0);
  check.heads("num_q_heads", params.num_q_heads, params.kv);
  if (params.num_tokens == 0) return;
  check.in_range("kv.num_seqs", params.kv.num_seqs, 1, 1);
  check.k(params.kv);
  check.v(params.kv);
  check.table({.ids = nullptr, .count = 1}, params.kv);
  check.at_least("kv.seq_lens", params.kv.host_len(0), params.num_tokens);
  check.pointer("q", params.q);
  check.pointer("out", params.out);
  check.scale(params.scale);
  if (params.num_tokens == 1) return;
  const std::int64_t row = std::int64_t{params.num_q_heads} * params.kv.head_dim;
  check.at_least("q_token_stride", params.q_token_stride, row);
  check.at_least("out_token_stride", params.out_token_stride, row);
}

void validate(const LinearParams& params) {
  const FieldChecks check{"linear"};
  check.at_least("num_rows", params.num_rows, 0);
  check.at_least("weight.rows", params.weight.rows, 1);
  check.at_least("weight.cols", params.weight.cols, 1);
  if (params.weight.quantised()) {
    const WeightType type = params.weight.blocks;
    require(is_weight_type(static_cast<std::int64_t>(type)), "linear", "weight.blocks, got ",
            static_cast<std::int64_t>(type), ", accepted the enumerators of WeightType");
    require(params.weight.cols % weight_block_length(type) == 0, "linear", "weight.cols, got ",
            params.weight.cols, ", accepted multiples of ", weight_block_length(type), " in ",
            weight_type_name(type));
  } else {
    check.dtype("weight.dtype", params.weight.dtype);
  }
  check.pointer("weight.data", params.weight.data);
  if (params.num_rows == 0) return;
  check.pointer("x", params.x);
  check.pointer("y", params.y);
  if (params.num_rows == 1) return;
  check.at_least("x_stride", params.x_stride, params.weight.cols);
  check.at_least("y_stride", params.y_stride, params.weight.rows);
}

void validate(const RmsNormParams& params) {
  const FieldChecks check{"rms_norm"};
  check.at_least("num_rows", params.num_rows, 0);
  check.at_least("hidden", params.hidden, 1);
  require(std::isfinite(params.eps) && params.eps >= 0, check.op, "eps, got ", params.eps,
          ", accepted finite numbers from 0");
  if (params.num_rows == 0) return;
  check.pointer("x", params.x);
  check.pointer("weight", params.weight);
  check.pointer("y", params.y);
}

void validate(const RopeParams& params) {
  const FieldChecks check{"rope"};
  check.at_least("num_tokens", params.num_tokens, 0);
  check.at_least("num_heads", params.num_heads, 1);
  require(params.head_dim >= 2 && params.head_dim % 2 == 0 && params.head_dim <= kMaxHeadDim,
          check.op, "head_dim, got ", params.head_dim, ", accepted even numbers up to ",
          kMaxHeadDim);
  if (params.num_tokens == 0) return;
  check.pointer("x", params.x);
  check.pointer("cos", params.cos);
  check.pointer("sin", params.sin);
  if (params.num_tokens == 1) return;
  check.at_least("token_stride", params.token_stride,
                 std::int64_t{params.num_heads} * params.head_dim);
}

void validate(const SiluMulParams& params) {
  const FieldChecks check{"silu_mul"};
  check.at_least("count", params.count, 0);
  if (params.count == 0) return;
  check.pointer("gate", params.gate);
  check.pointer("up", params.up);
  check.pointer("y", params.y);
}

}  // namespace twilight
