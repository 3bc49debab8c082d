#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/ref/ref_backend.h"
#include "backend/ref/ref_rows.h"
#include "core/float16.h"
#include "quant/page_codec.h"
#include "quant/rotation.h"

namespace twilight::ref {
namespace {

/// log(sum exp(x)).
double log_sum(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) sum += std::exp(value - top);
  return top + std::log(sum);
}

/// Estimated log mass of a page for one head; `q` is rotated, `scratch` [D].
double page_log_mass(const IndexFormat& format, const PageRecords& records, int page_size,
                     std::span<const float> q, double scale, std::span<float> scratch) {
  const double spread =
      0.5 * scale * scale * dot(q.data(), q) * double{f16_to_f32(records.params->variance)};
  std::vector<double> terms;
  if (num_centroids(format.summary) > 1) {
    const int tokens = centroid_tokens(format.summary, page_size);
    for (int i = 0; i * tokens < page_size; ++i) {
      decode_centre(records, i, scratch);
      const int covered = std::min(tokens, page_size - i * tokens);
      terms.push_back(scale * dot(q.data(), scratch) + spread + std::log(double(covered)));
    }
    return log_sum(terms);
  }
  decode_centre(records, 0, scratch);
  const double centre = scale * dot(q.data(), scratch);
  decode_deviant(records, scratch);
  terms.push_back(centre + scale * dot(q.data(), scratch));
  if (page_size > 1) terms.push_back(centre + spread + std::log(double(page_size - 1)));
  return log_sum(terms);
}

}  // namespace

void RefBackend::score_by_mass(const ScorePagesParams& params) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.q.num_heads / kv.num_kv_heads;
  const auto dim = static_cast<std::size_t>(kv.head_dim);
  std::vector<float> scratch(dim);
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    const std::int64_t pages = kv.sealed_pages(seq);
    if (pages == 0) continue;
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      std::vector<std::vector<double>> logs;
      for (std::int64_t g = 0; g < group; ++g) {
        const float* row =
            params.q.data + seq * params.q.seq_stride + (head * group + g) * kv.head_dim;
        std::vector<float> q(row, row + dim);
        rotate(q);
        auto& masses = logs.emplace_back();
        for (std::int64_t page = 0; page < pages; ++page) {
          masses.push_back(page_log_mass(
              params.index.format,
              page_records(params.index, kv.page_of(seq, page), head, kv.page_size, kv.head_dim),
              kv.page_size, q, double{params.scale}, scratch));
        }
      }
      float* scores = params.scores + (seq * kv.num_kv_heads + head) * params.page_stride;
      if (params.log_masses != nullptr) {
        for (std::size_t g = 0; g < logs.size(); ++g) {
          const std::int64_t row =
              seq * params.q.num_heads + head * group + static_cast<std::int64_t>(g);
          for (std::int64_t page = 0; page < pages; ++page) {
            params.log_masses[row * params.page_stride + page] =
                static_cast<float>(logs[g][static_cast<std::size_t>(page)]);
          }
        }
      }
      std::vector<double> norms;
      norms.reserve(logs.size());
      for (const auto& masses : logs) norms.push_back(log_sum(masses));
      for (std::int64_t page = 0; page < pages; ++page) {
        std::vector<double> terms;
        terms.reserve(logs.size());
        for (std::size_t g = 0; g < logs.size(); ++g) {
          terms.push_back(logs[g][static_cast<std::size_t>(page)] - norms[g]);
        }
        scores[page] = static_cast<float>(log_sum(terms) - std::log(double(group)));
      }
    }
  }
}

}  // namespace twilight::ref
