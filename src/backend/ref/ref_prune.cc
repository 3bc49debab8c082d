#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/ref/ref_backend.h"

namespace twilight::ref {
namespace {

/// Candidate slots with a weight, in the order pruning takes them.
struct Ranking {
  std::vector<double> weights;       ///< per slot, 0 where there is no token
  std::vector<double> ranks;         ///< per slot: the weight, or a negative number below 2^-126
  double total = 0;                  ///< sum of the weights, largest first
  std::vector<std::int64_t> ranked;  ///< slots that take part, largest rank first, then by slot

  void sort() {
    std::stable_sort(ranked.begin(), ranked.end(), [&](std::int64_t a, std::int64_t b) {
      return ranks[static_cast<std::size_t>(a)] > ranks[static_cast<std::size_t>(b)];
    });
    for (const std::int64_t slot : ranked) total += weights[static_cast<std::size_t>(slot)];
  }
};

/// One query head: weights e^(score - row maximum). Scores that are -inf or NaN take no part.
Ranking head_ranking(const float* scores, std::int64_t slots, float* top) {
  Ranking r;
  r.weights.assign(static_cast<std::size_t>(slots), 0.0);
  r.ranks.assign(static_cast<std::size_t>(slots), 0.0);
  *top = -std::numeric_limits<float>::infinity();
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    if (scores[slot] > *top) *top = scores[slot];
  }
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    if (!(scores[slot] > -std::numeric_limits<float>::infinity())) continue;
    r.ranked.push_back(slot);
    r.ranks[static_cast<std::size_t>(slot)] = double{scores[slot]};
    r.weights[static_cast<std::size_t>(slot)] =
        scores[slot] == *top ? 1.0 : std::exp(double{scores[slot]} - double{*top});
  }
  r.sort();
  return r;
}

/// Mean of the group's normalised weights. Below 2^-126, where f32 loses them, slots rank by the
/// largest log weight of any head.
Ranking group_ranking(const std::vector<Ranking>& heads, const std::vector<float>& tops,
                      std::int64_t slots) {
  Ranking r;
  r.weights.assign(static_cast<std::size_t>(slots), 0.0);
  r.ranks.assign(static_cast<std::size_t>(slots), -std::numeric_limits<double>::infinity());
  std::vector<char> present(static_cast<std::size_t>(slots), 0);
  for (std::size_t g = 0; g < heads.size(); ++g) {
    for (const std::int64_t slot : heads[g].ranked) {
      const auto s = static_cast<std::size_t>(slot);
      present[s] = 1;
      r.weights[s] += heads[g].weights[s] / heads[g].total / static_cast<double>(heads.size());
      r.ranks[s] =
          std::max(r.ranks[s], heads[g].ranks[s] - double{tops[g]} - std::log(heads[g].total));
    }
  }
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    const auto s = static_cast<std::size_t>(slot);
    if (present[s] == 0) continue;
    if (r.weights[s] >= 0x1p-126) r.ranks[s] = r.weights[s];
    r.ranked.push_back(slot);
  }
  r.sort();
  return r;
}

/// Marks the top-p set: the shortest run from the top of the ranking with mass >= p and at least
/// `min_tokens` members, then everything that ties with its last member.
void mark_top_p(const Ranking& r, double p, std::int64_t min_tokens, std::vector<char>& own) {
  double mass = 0;
  std::int64_t count = 0;
  double weakest = 0;
  for (const std::int64_t slot : r.ranked) {
    const auto s = static_cast<std::size_t>(slot);
    const bool enough = p < 1 && mass >= p * r.total && count >= min_tokens && count > 0;
    if (enough && r.ranks[s] != weakest) break;
    own[s] = 1;
    mass += r.weights[s];
    weakest = r.ranks[s];
    ++count;
  }
}

std::int32_t count_of(const std::vector<char>& marks) {
  return static_cast<std::int32_t>(std::count(marks.begin(), marks.end(), 1));
}

/// Pruning of one (sequence, KV head).
class Unit {
 public:
  Unit(const PruneParams& params, std::int64_t seq, std::int64_t kv_head)
      : params_(params),
        row_(seq * params.kv.num_kv_heads + kv_head),
        group_(params.num_q_heads / params.kv.num_kv_heads),
        n_(params.kv.seq_lens[seq]),
        pages_(params.pages + row_ * params.candidate_stride),
        slots_(std::int64_t{params.page_counts[row_]} * params.kv.page_size) {}

  void run() {
    const bool prunes = params_.criterion != PruneCriterion::kNone;
    std::vector<char> always(static_cast<std::size_t>(slots_), 0);
    for (std::int64_t slot = 0; slot < slots_; ++slot) {
      const std::int64_t token = token_of(slot);
      always[static_cast<std::size_t>(slot)] =
          token < n_ && (!prunes || params_.forced.contains(token, n_, params_.kv.page_size));
    }
    kept_ = always;
    if (prunes) rank_heads();
    std::vector<char> group_set = always;
    if (params_.criterion == PruneCriterion::kGroupMean) {
      const float* p = params_.p + row_ * group_;
      mark_top_p(group_ranking(heads_, tops_, slots_), *std::max_element(p, p + group_),
                 params_.min_tokens, group_set);
    }
    for (std::int64_t g = 0; g < group_; ++g) {
      const std::int64_t head = row_ * group_ + g;
      std::vector<char> own = group_set;
      if (params_.criterion == PruneCriterion::kPerHead) {
        mark_top_p(heads_[static_cast<std::size_t>(g)], params_.p[head], params_.min_tokens, own);
      }
      params_.head_counts[head] = count_of(own);
      for (std::size_t slot = 0; slot < kept_.size(); ++slot) kept_[slot] |= own[slot];
    }
    write_kept();
    for (std::int64_t g = 0; g < group_; ++g) write_mass(g, prunes);
  }

 private:
  [[nodiscard]] std::int64_t token_of(std::int64_t slot) const {
    const std::int32_t page_size = params_.kv.page_size;
    return std::int64_t{pages_[slot / page_size]} * page_size + slot % page_size;
  }

  void rank_heads() {
    tops_.resize(static_cast<std::size_t>(group_));
    for (std::int64_t g = 0; g < group_; ++g) {
      heads_.push_back(
          head_ranking(params_.estimates + (row_ * group_ + g) * params_.estimate_stride, slots_,
                       &tops_[static_cast<std::size_t>(g)]));
    }
  }

  void write_kept() const {
    std::int32_t count = 0;
    for (std::int64_t slot = 0; slot < slots_; ++slot) {
      if (kept_[static_cast<std::size_t>(slot)] == 0) continue;
      params_.kept[row_ * params_.kept_stride + count++] =
          static_cast<std::int32_t>(token_of(slot));
    }
    params_.kept_counts[row_] = count;
  }

  void write_mass(std::int64_t g, bool prunes) const {
    const std::int64_t head = row_ * group_ + g;
    params_.head_mass[head] = 1.0F;
    if (!prunes) return;
    const Ranking& r = heads_[static_cast<std::size_t>(g)];
    const std::int32_t page_size = params_.kv.page_size;
    std::vector<double> dropped(static_cast<std::size_t>(slots_ / page_size), 0.0);
    double mass = 0;
    for (const std::int64_t slot : r.ranked) {
      const auto s = static_cast<std::size_t>(slot);
      (kept_[s] != 0 ? mass : dropped[s / static_cast<std::size_t>(page_size)]) += r.weights[s];
    }
    params_.head_mass[head] = r.total > 0 ? static_cast<float>(mass / r.total) : 0.0F;
    if (params_.tail_mass == nullptr) return;
    params_.tail_shift[head] = tops_[static_cast<std::size_t>(g)];
    for (std::size_t page = 0; page < dropped.size(); ++page) {
      params_.tail_mass[head * params_.candidate_stride + static_cast<std::int64_t>(page)] =
          static_cast<float>(dropped[page]);
    }
  }

  const PruneParams& params_;
  std::int64_t row_;
  std::int64_t group_;
  std::int64_t n_;
  const std::int32_t* pages_;
  std::int64_t slots_;
  std::vector<char> kept_;
  std::vector<Ranking> heads_;
  std::vector<float> tops_;
};

}  // namespace

void RefBackend::do_prune_top_p(const PruneParams& params, Workspace /*workspace*/) {
  for (std::int64_t i = 0; i < params.seqs.count; ++i) {
    for (std::int64_t head = 0; head < params.kv.num_kv_heads; ++head) {
      Unit(params, params.seqs.at(i), head).run();
    }
  }
}

}  // namespace twilight::ref
