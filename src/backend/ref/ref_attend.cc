#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/ref/ref_backend.h"
#include "backend/ref/ref_rows.h"
#include "quant/page_codec.h"

namespace twilight::ref {
namespace {

/// Mean values of a KV head's candidate pages and what one query head dropped of them.
struct HeadTail {
  const TailParams* params = nullptr;  ///< null for no tail
  std::int64_t unit = 0;               ///< (sequence, KV head)
  std::int64_t q_head = 0;             ///< (sequence, query head)

  [[nodiscard]] std::int64_t pages() const {
    return params == nullptr ? 0 : params->page_counts[unit];
  }
  [[nodiscard]] double mass(std::int64_t i) const {
    return double{params->mass[q_head * params->candidate_stride + i]};
  }
  [[nodiscard]] double shift() const { return double{params->shift[q_head]}; }
};

/// out [D] = softmax(scale q.k) v over `num_tokens` tokens, token_at(i) the i-th position, and the
/// tail under the same normaliser. No tokens and no tail give zeros.
template <typename TokenAt>
void attend(const PagedKvView& kv, std::int64_t seq, std::int64_t head, const float* q,
            double scale, std::int64_t num_tokens, const TokenAt& token_at, float* out,
            const HeadTail& tail = {}) {
  std::vector<float> row(static_cast<std::size_t>(kv.head_dim));
  std::vector<double> weights(static_cast<std::size_t>(num_tokens));
  double max = -std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    load_row(kv.dtype, k_row(kv, seq, token_at(i), head), row);
    const double score = dot(q, row) * scale;
    weights[static_cast<std::size_t>(i)] = score;
    max = std::max(max, score);
  }
  bool any_tail = false;
  for (std::int64_t i = 0; i < tail.pages(); ++i) any_tail = any_tail || tail.mass(i) > 0;
  if (any_tail) max = std::max(max, tail.shift());
  std::vector<double> sum(static_cast<std::size_t>(kv.head_dim), 0.0);
  double total = 0;
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    const double weight = std::exp(weights[static_cast<std::size_t>(i)] - max);
    total += weight;
    load_row(kv.dtype, v_row(kv, seq, token_at(i), head), row);
    for (std::size_t d = 0; d < row.size(); ++d) sum[d] += weight * double{row[d]};
  }
  for (std::int64_t i = 0; i < tail.pages(); ++i) {
    if (!(tail.mass(i) > 0)) continue;
    const double weight = tail.mass(i) * std::exp(tail.shift() - max);
    const std::int64_t page =
        kv.page_of(seq, tail.params->pages[tail.unit * tail.params->candidate_stride + i]);
    total += weight;
    decode_value_mean(page_records(tail.params->index, page, head, kv.page_size, kv.head_dim), row);
    for (std::size_t d = 0; d < row.size(); ++d) sum[d] += weight * double{row[d]};
  }
  for (std::size_t d = 0; d < row.size(); ++d) {
    out[d] = num_tokens == 0 && !any_tail ? 0.0F : static_cast<float>(sum[d] / total);
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
      attend(kv, seq, q_head / group,
             params.q.data + seq * params.q.seq_stride + q_head * kv.head_dim, params.scale,
             params.kept_counts[row], [&](std::int64_t k) { return std::int64_t{kept[k]}; },
             params.out + seq * params.out_seq_stride + q_head * kv.head_dim,
             {params.tail.mass == nullptr ? nullptr : &params.tail, row,
              seq * params.q.num_heads + q_head});
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
