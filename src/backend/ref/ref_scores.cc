#include <algorithm>
#include <limits>
#include <vector>

#include "backend/ref/ref_backend.h"
#include "backend/ref/ref_rows.h"
#include "quant/codec.h"
#include "quant/page_codec.h"
#include "quant/rotation.h"

namespace twilight::ref {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const float* query(const QueryView& q, std::int64_t seq, std::int64_t q_head,
                   std::int64_t head_dim) {
  return q.data + seq * q.seq_stride + q_head * head_dim;
}

/// The largest q.k over the page's tokens and the group's heads, on the label channels alone.
void score_labels(const ScorePagesParams& params) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  const std::int32_t channels = params.index.format.label_channels;
  std::vector<float> key(static_cast<std::size_t>(channels));
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      float* scores = params.scores + (seq * kv.num_kv_heads + head) * params.page_stride;
      const std::int32_t* labels = params.index.head_labels(head);
      for (std::int64_t page_idx = 0; page_idx < kv.sealed_pages(seq); ++page_idx) {
        const std::byte* record = params.index.summary(kv.page_of(seq, page_idx), head);
        double best = -kInfinity;
        for (std::int32_t slot = 0; slot < kv.page_size; ++slot) {
          decode_estimate(IndexLayout::kTokenLanes, 4, kv.page_size, channels, record, slot, key);
          for (std::int64_t g = 0; g < group; ++g) {
            const float* q = query(params.q, seq, head * group + g, kv.head_dim);
            double sum = 0;
            for (std::int32_t c = 0; c < channels; ++c) {
              sum += double{q[labels[c]]} * double{key[static_cast<std::size_t>(c)]};
            }
            best = std::max(best, sum);
          }
        }
        scores[page_idx] = static_cast<float>(best * double{params.scale});
      }
    }
  }
}

}  // namespace

void RefBackend::do_score_pages(const ScorePagesParams& params, Workspace /*workspace*/) {
  if (num_centroids(params.index.format.summary) > 0) {
    score_by_mass(params);
    return;
  }
  if (params.index.format.summary == SummaryKind::kLabels) {
    score_labels(params);
    return;
  }
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  const auto dim = static_cast<std::size_t>(kv.head_dim);
  std::vector<float> min(dim);
  std::vector<float> max(dim);
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      float* scores = params.scores + (seq * kv.num_kv_heads + head) * params.page_stride;
      for (std::int64_t page_idx = 0; page_idx < kv.sealed_pages(seq); ++page_idx) {
        decode_quest_summary(params.index.format.summary, kv.head_dim,
                             params.index.summary(kv.page_of(seq, page_idx), head), min, max);
        double best = -kInfinity;
        for (std::int64_t g = 0; g < group; ++g) {
          const float* q = query(params.q, seq, head * group + g, kv.head_dim);
          double sum = 0;
          for (std::size_t d = 0; d < dim; ++d) {
            sum += std::max(double{q[d]} * double{min[d]}, double{q[d]} * double{max[d]});
          }
          best = std::max(best, sum);
        }
        scores[page_idx] = static_cast<float>(best * double{params.scale});
      }
    }
  }
}

void RefBackend::do_exact_scores(const ExactScoresParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  std::vector<float> key(static_cast<std::size_t>(kv.head_dim));
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      for (std::int64_t token = 0; token < kv.seq_lens[seq]; ++token) {
        load_row(kv.dtype, k_row(kv, seq, token, head), key);
        for (std::int64_t g = 0; g < group; ++g) {
          const std::int64_t q_head = head * group + g;
          const float* q = query(params.q, seq, q_head, kv.head_dim);
          params.scores[(seq * params.q.num_heads + q_head) * params.token_stride + token] =
              static_cast<float>(dot(q, key) * double{params.scale});
        }
      }
    }
  }
}

void RefBackend::do_estimate_scores(const EstimateParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  std::vector<float> key(static_cast<std::size_t>(kv.head_dim));
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      const std::int64_t row = seq * kv.num_kv_heads + head;
      const std::int32_t* pages = params.pages + row * params.candidate_stride;
      for (std::int64_t c = 0; c < params.page_counts[row]; ++c) {
        const bool from_keys = params.exact_keys || pages[c] >= kv.sealed_pages(seq);
        for (std::int32_t slot = 0; slot < kv.page_size; ++slot) {
          const std::int64_t token = std::int64_t{pages[c]} * kv.page_size + slot;
          const bool exists = token < kv.seq_lens[seq];
          if (exists && from_keys) {
            load_row(kv.dtype, k_row(kv, seq, token, head), key);
          } else if (exists) {
            decode_estimated_key(params.index.format, kv.page_size, kv.head_dim,
                                 page_records(params.index, kv.page_of(seq, pages[c]), head,
                                              kv.page_size, kv.head_dim),
                                 slot, key);
            if (params.index.format.key_bits == 2) rotate_back(key);
          }
          for (std::int64_t g = 0; g < group; ++g) {
            const std::int64_t q_head = head * group + g;
            const float* q = query(params.q, seq, q_head, kv.head_dim);
            const double score = exists ? dot(q, key) * double{params.scale} : -kInfinity;
            params.estimates[(seq * params.q.num_heads + q_head) * params.estimate_stride +
                             c * kv.page_size + slot] = static_cast<float>(score);
          }
        }
      }
    }
  }
}

}  // namespace twilight::ref
