#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/ref/ref_backend.h"

namespace twilight::ref {
namespace {

/// Sealed pages without forced tokens, best score first, equal scores by page, NaN last.
std::vector<std::int32_t> ranked_pages(const SelectPagesParams& params, std::int64_t n,
                                       const float* scores) {
  const std::int32_t page_size = params.kv.page_size;
  std::vector<std::int32_t> ranked;
  for (std::int32_t page = 0; page < n / page_size; ++page) {
    if (!params.forced.contains_page(page, n, page_size)) ranked.push_back(page);
  }
  std::sort(ranked.begin(), ranked.end(), [&](std::int32_t a, std::int32_t b) {
    const bool a_nan = std::isnan(scores[a]);
    const bool b_nan = std::isnan(scores[b]);
    if (a_nan != b_nan) return b_nan;
    if (!a_nan && scores[a] != scores[b]) return scores[a] > scores[b];
    return a < b;
  });
  return ranked;
}

/// exp(score - largest) of the sealed pages; 0 for NaN.
std::vector<double> page_masses(std::int64_t pages, const float* scores) {
  std::vector<double> masses(static_cast<std::size_t>(pages), 0.0);
  float top = -std::numeric_limits<float>::infinity();
  for (std::int64_t page = 0; page < pages; ++page) {
    if (scores[page] > top) top = scores[page];
  }
  for (std::int64_t page = 0; page < pages; ++page) {
    if (std::isnan(scores[page]) || std::isinf(top)) continue;
    masses[static_cast<std::size_t>(page)] = std::exp(double{scores[page]} - double{top});
  }
  return masses;
}

std::vector<std::int32_t> candidates(const SelectPagesParams& params, std::int64_t n,
                                     const float* scores) {
  const std::int32_t page_size = params.kv.page_size;
  const auto total = static_cast<std::int32_t>((n + page_size - 1) / page_size);
  std::vector<std::int32_t> list;
  for (std::int32_t page = 0; page < total; ++page) {
    if (params.mode == SelectMode::kAll || params.forced.contains_page(page, n, page_size)) {
      list.push_back(page);
    }
  }
  if (params.mode != SelectMode::kByScore) return list;
  const std::int64_t budget = params.budget_pages(n);
  const std::int64_t floor = (params.mass_floor + page_size - 1) / page_size;
  const std::vector<double> masses = page_masses(n / page_size, scores);
  double all = 0;
  double taken = 0;
  for (const double mass : masses) all += mass;
  for (const std::int32_t page : list) {
    if (page < n / page_size) taken += masses[static_cast<std::size_t>(page)];
  }
  for (const std::int32_t page : ranked_pages(params, n, scores)) {
    if (std::ssize(list) >= budget) break;
    if (params.mass > 0 && std::ssize(list) >= floor && taken >= params.mass * all) break;
    list.push_back(page);
    taken += masses[static_cast<std::size_t>(page)];
  }
  std::sort(list.begin(), list.end());
  return list;
}

}  // namespace

void RefBackend::do_select_pages(const SelectPagesParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      const std::int64_t row = seq * kv.num_kv_heads + head;
      const float* scores =
          params.scores == nullptr ? nullptr : params.scores + row * params.page_stride;
      const std::vector<std::int32_t> list = candidates(params, kv.seq_lens[seq], scores);
      std::copy(list.begin(), list.end(), params.pages + row * params.candidate_stride);
      params.page_counts[row] = static_cast<std::int32_t>(list.size());
    }
  }
}

}  // namespace twilight::ref
