#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/ref/ref_backend.h"
#include "backend/ref/ref_rows.h"
#include "quant/page_codec.h"

namespace twilight::ref {
namespace {

/// A page that counts by its mean value.
struct PageTerm {
  std::int64_t page_idx = 0;
  double log_mass = 0;
};

/// Candidate pages with dropped mass and, with a far tail, sealed pages outside the candidates.
std::vector<PageTerm> tail_terms(const TailParams& tail, const PagedKvView& kv, std::int64_t seq,
                                 std::int64_t unit, std::int64_t q_row) {
  std::vector<PageTerm> terms;
  if (tail.mass == nullptr) return terms;
  const std::int32_t* pages = tail.pages + unit * tail.candidate_stride;
  const std::int32_t count = tail.page_counts[unit];
  for (std::int64_t i = 0; i < count; ++i) {
    const double mass = double{tail.mass[q_row * tail.candidate_stride + i]};
    if (mass > 0) terms.push_back({pages[i], std::log(mass) + double{tail.shift[q_row]}});
  }
  if (tail.log_masses == nullptr) return terms;
  const std::int64_t sealed = kv.sealed_pages(seq);
  const float lowest = tail.lowest_far_score(sealed);
  for (std::int64_t page = 0; page < sealed; ++page) {
    if (std::binary_search(pages, pages + count, static_cast<std::int32_t>(page))) continue;
    if (!(tail.scores[unit * tail.page_stride + page] >= lowest)) continue;
    terms.push_back({page, double{tail.log_masses[q_row * tail.page_stride + page]}});
  }
  return terms;
}

/// out [D] = softmax(scale q.k) v over `num_tokens` tokens, token_at(i) the i-th position, and the
/// tail under the same normaliser. No tokens and no tail give zeros.
template <typename TokenAt>
void attend(const PagedKvView& kv, std::int64_t seq, std::int64_t head, const float* q,
            double scale, std::int64_t num_tokens, const TokenAt& token_at, float* out,
            const std::vector<PageTerm>& tail = {}, const KeyIndexView& index = {}) {
  std::vector<float> row(static_cast<std::size_t>(kv.head_dim));
  std::vector<double> weights(static_cast<std::size_t>(num_tokens));
  double max = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    load_row(kv.dtype, k_row(kv, seq, token_at(i), head), row);
    const double score = dot(q, row) * scale;
    weights[static_cast<std::size_t>(i)] = score;
    max = std::max(max, score);
  }
  for (const PageTerm& term : tail) max = std::max(max, term.log_mass);
  std::vector<double> sum(static_cast<std::size_t>(kv.head_dim), 0.0);
  double total = 0;
  const auto add = [&](double weight) {
    total += weight;
    for (std::size_t d = 0; d < row.size(); ++d) sum[d] += weight * double{row[d]};
  };
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    load_row(kv.dtype, v_row(kv, seq, token_at(i), head), row);
    add(std::exp(weights[static_cast<std::size_t>(i)] - max));
  }
  for (const PageTerm& term : tail) {
    decode_value_mean(
        page_records(index, kv.page_of(seq, term.page_idx), head, kv.page_size, kv.head_dim), row);
    add(std::exp(term.log_mass - max));
  }
  for (std::size_t d = 0; d < row.size(); ++d) {
    out[d] = num_tokens == 0 && tail.empty() ? 0.0F : static_cast<float>(sum[d] / total);
  }
}

}  // namespace

void RefBackend::do_attend_dense(const AttendDenseParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t q_head = 0; q_head < params.q.num_heads; ++q_head) {
      attend(
          kv, seq, q_head / group, params.q.data + seq * params.q.seq_stride + q_head * kv.head_dim,
          params.scale, kv.seq_lens[seq], [](std::int64_t token) { return token; },
          params.out + seq * params.out_seq_stride + q_head * kv.head_dim);
    }
  }
}

void RefBackend::do_attend_sparse(const AttendSparseParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t q_head = 0; q_head < params.q.num_heads; ++q_head) {
      const std::int64_t row = seq * kv.num_kv_heads + q_head / group;
      const std::int32_t* kept = params.kept + row * params.kept_stride;
      attend(
          kv, seq, q_head / group, params.q.data + seq * params.q.seq_stride + q_head * kv.head_dim,
          params.scale, params.kept_counts[row],
          [&](std::int64_t k) { return std::int64_t{kept[k]}; },
          params.out + seq * params.out_seq_stride + q_head * kv.head_dim,
          tail_terms(params.tail, kv, seq, row, seq * params.q.num_heads + q_head),
          params.tail.index);
    }
  }
}

void RefBackend::do_attend_prefill(const AttendPrefillParams& params) {
  const PagedKvView& kv = params.kv;
  if (params.num_tokens == 0) return;
  const std::int64_t group = params.num_q_heads / kv.num_kv_heads;
  const std::int64_t before = kv.seq_lens[0] - params.num_tokens;
  for (std::int64_t token = 0; token < params.num_tokens; ++token) {
    for (std::int64_t q_head = 0; q_head < params.num_q_heads; ++q_head) {
      attend(
          kv, 0, q_head / group, params.q + token * params.q_token_stride + q_head * kv.head_dim,
          params.scale, before + token + 1, [](std::int64_t position) { return position; },
          params.out + token * params.out_token_stride + q_head * kv.head_dim);
    }
  }
}

}  // namespace twilight::ref
