#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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
  for (const std::int32_t page : ranked_pages(params, n, scores)) {
    if (std::ssize(list) >= budget) break;
    list.push_back(page);
  }
  std::sort(list.begin(), list.end());
  return list;
}

/// One query head's view of the candidate slots.
struct HeadWeights {
  std::vector<double> weights;       ///< e^(score - row maximum); 0 where -inf or NaN
  double total = 0;                  ///< sum of the weights, largest first
  std::vector<std::int64_t> ranked;  ///< slots that are neither -inf nor NaN, largest score first

  HeadWeights(const float* scores, std::int64_t count)
      : weights(static_cast<std::size_t>(count), 0.0) {
    for (std::int64_t slot = 0; slot < count; ++slot) {
      if (scores[slot] > -std::numeric_limits<float>::infinity()) ranked.push_back(slot);
    }
    std::stable_sort(ranked.begin(), ranked.end(),
                     [&](std::int64_t a, std::int64_t b) { return scores[a] > scores[b]; });
    for (const std::int64_t slot : ranked) {
      const double max = scores[ranked.front()];
      const double score = scores[slot];
      const double weight = score == max ? 1.0 : std::exp(score - max);
      weights[static_cast<std::size_t>(slot)] = weight;
      total += weight;
    }
  }
};

/// Marks the head's own set: the shortest run from the top of the ranking with mass >= p and at
/// least `min_tokens` members, then everything that ties with its last member.
void mark_top_p(const HeadWeights& head, const float* scores, double p, std::int64_t min_tokens,
                std::vector<char>& own) {
  double mass = 0;
  std::int64_t count = 0;
  float weakest = 0;
  for (const std::int64_t slot : head.ranked) {
    const bool enough = p < 1 && mass >= p * head.total && count >= min_tokens && count > 0;
    if (enough && scores[slot] != weakest) break;
    own[static_cast<std::size_t>(slot)] = 1;
    mass += head.weights[static_cast<std::size_t>(slot)];
    weakest = scores[slot];
    ++count;
  }
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

void RefBackend::do_prune_top_p(const PruneParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  const std::int64_t group = params.num_q_heads / kv.num_kv_heads;
  const bool prunes = params.criterion == PruneCriterion::kPerHead;
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    const std::int64_t seq = params.seqs.at(i);
    const std::int64_t n = kv.seq_lens[seq];
    for (std::int64_t kv_head = 0; kv_head < kv.num_kv_heads; ++kv_head) {
      const std::int64_t row = seq * kv.num_kv_heads + kv_head;
      const std::int32_t* pages = params.pages + row * params.candidate_stride;
      const std::int64_t num_slots = std::int64_t{params.page_counts[row]} * kv.page_size;
      const auto token_of = [&](std::int64_t slot) {
        return std::int64_t{pages[slot / kv.page_size]} * kv.page_size + slot % kv.page_size;
      };

      std::vector<char> always(static_cast<std::size_t>(num_slots), 0);
      for (std::int64_t slot = 0; slot < num_slots; ++slot) {
        const std::int64_t token = token_of(slot);
        always[static_cast<std::size_t>(slot)] =
            token < n && (!prunes || params.forced.contains(token, n, kv.page_size));
      }
      std::vector<char> kept = always;
      std::vector<HeadWeights> heads;
      for (std::int64_t g = 0; g < group; ++g) {
        const std::int64_t q_row = seq * params.num_q_heads + kv_head * group + g;
        std::vector<char> own = always;
        if (prunes) {
          const float* scores = params.estimates + q_row * params.estimate_stride;
          heads.emplace_back(scores, num_slots);
          mark_top_p(heads.back(), scores, params.p[q_row], params.min_tokens, own);
        }
        params.head_counts[q_row] =
            static_cast<std::int32_t>(std::count(own.begin(), own.end(), 1));
        for (std::size_t slot = 0; slot < kept.size(); ++slot) kept[slot] |= own[slot];
      }

      std::int32_t count = 0;
      for (std::int64_t slot = 0; slot < num_slots; ++slot) {
        if (kept[static_cast<std::size_t>(slot)] == 0) continue;
        params.kept[row * params.kept_stride + count++] = static_cast<std::int32_t>(token_of(slot));
      }
      params.kept_counts[row] = count;
      for (std::int64_t g = 0; g < group; ++g) {
        const std::int64_t q_row = seq * params.num_q_heads + kv_head * group + g;
        params.head_mass[q_row] = 1.0F;
        if (!prunes) continue;
        const HeadWeights& head = heads[static_cast<std::size_t>(g)];
        double mass = 0;
        for (const std::int64_t slot : head.ranked) {
          if (kept[static_cast<std::size_t>(slot)] != 0) {
            mass += head.weights[static_cast<std::size_t>(slot)];
          }
        }
        params.head_mass[q_row] = head.total > 0 ? static_cast<float>(mass / head.total) : 0.0F;
      }
    }
  }
}

}  // namespace twilight::ref
