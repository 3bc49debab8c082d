#include "support/prune_promises.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>

namespace twilight::test {
namespace {

/// Position of each candidate slot; -1 past the end of the sequence.
std::vector<std::int64_t> slot_tokens(std::span<const std::int32_t> pages, std::int64_t page_size,
                                      std::int64_t n) {
  std::vector<std::int64_t> tokens;
  for (const std::int32_t page : pages) {
    for (std::int64_t slot = 0; slot < page_size; ++slot) {
      const std::int64_t token = page * page_size + slot;
      tokens.push_back(token < n ? token : -1);
    }
  }
  return tokens;
}

/// Scores of one head, sorted, with the mass of every run from the top.
class Ranking {
 public:
  explicit Ranking(std::span<const double> scores) {
    for (const double s : scores) {
      if (s > -std::numeric_limits<double>::infinity()) sorted_.push_back(s);
    }
    std::sort(sorted_.begin(), sorted_.end(), std::greater<>());
    prefix_.push_back(0.0);
    for (const double s : sorted_) prefix_.push_back(prefix_.back() + weight(s));
  }

  [[nodiscard]] double weight(double score) const {
    return score == sorted_.front() ? 1.0 : std::exp(score - sorted_.front());
  }
  [[nodiscard]] double total() const { return prefix_.back(); }
  [[nodiscard]] double top() const { return sorted_.front(); }
  [[nodiscard]] std::size_t size() const { return sorted_.size(); }

  struct Above {
    double mass = 0;
    std::int64_t count = 0;
  };
  /// All scores strictly above `score`.
  [[nodiscard]] Above above(double score) const {
    const auto end = std::lower_bound(sorted_.begin(), sorted_.end(), score, std::greater<>());
    const auto count = end - sorted_.begin();
    return {.mass = prefix_[static_cast<std::size_t>(count)], .count = count};
  }
  /// All scores above `score - margin` but for those equal to `score`.
  [[nodiscard]] Above above_or_near(double score, double margin) const {
    if (margin == 0) return above(score);
    const Above near = above(score - margin);
    const auto [first, last] =
        std::equal_range(sorted_.begin(), sorted_.end(), score, std::greater<>());
    const auto equal = last - first;
    return {.mass = near.mass - static_cast<double>(equal) * weight(score),
            .count = near.count - equal};
  }

 private:
  std::vector<double> sorted_;
  std::vector<double> prefix_;
};

std::string where(const OpCase& op_case, std::int64_t seq, std::int64_t head) {
  return op_case.name + ", sequence " + std::to_string(seq) + ", head " + std::to_string(head);
}

bool is_kept(std::span<const std::int32_t> kept, std::int64_t token) {
  return std::binary_search(kept.begin(), kept.end(), token);
}

void check_kept_list(const OpCase& op_case, const PagedFixture& fixture, std::int64_t seq,
                     std::span<const std::int64_t> tokens, std::span<const std::int32_t> kept) {
  const std::int64_t n = fixture.kv().seq_lens[seq];
  for (std::size_t i = 0; i < kept.size(); ++i) {
    ASSERT_TRUE(kept[i] >= 0 && kept[i] < n) << "kept token " << kept[i] << " of " << n;
    ASSERT_TRUE(i == 0 || kept[i] > kept[i - 1]) << "not ascending at " << i;
    ASSERT_TRUE(
        std::binary_search(tokens.begin(), std::find(tokens.begin(), tokens.end(), -1), kept[i]))
        << "token " << kept[i] << " is no candidate";
  }
  for (const std::int64_t token : tokens) {
    if (token < 0) continue;
    const bool must = op_case.policy.criterion == PruneCriterion::kNone ||
                      op_case.policy.forced.contains(token, n, fixture.shape().page_size);
    ASSERT_TRUE(!must || is_kept(kept, token)) << "token " << token << " is missing";
  }
}

/// One (sequence, KV head) of a pruned step.
struct Unit {
  const OpCase& op_case;
  std::int64_t n = 0;
  std::span<const std::int64_t> tokens;  ///< of the candidate slots
  std::span<const std::int32_t> kept;

  [[nodiscard]] bool forced(std::int64_t token) const {
    return op_case.policy.forced.contains(token, n, op_case.shape.page_size);
  }
};

/// Checks the top-p set of one row of scores (logs of weights) and marks in `allowed` the tokens it
/// may have put into the union. `count` is what the step says of the set with the forced tokens.
void check_set(const Unit& unit, std::span<const double> scores, double p, std::int32_t count,
               PromiseTolerance tolerance, std::set<std::int64_t>& allowed) {
  const Ranking ranking(scores);
  if (ranking.size() == 0) return;
  const double total = ranking.total();
  double kept_mass = 0;
  std::int64_t fewest = 0;
  std::int64_t most = 0;
  for (std::size_t slot = 0; slot < unit.tokens.size(); ++slot) {
    const std::int64_t token = unit.tokens[slot];
    if (token < 0) continue;
    const double score = scores[slot];
    bool must = false;
    bool may = false;
    if (score > -std::numeric_limits<double>::infinity()) {
      const auto near = ranking.above_or_near(score, tolerance.score);
      const auto sure = ranking.above(score + tolerance.score);
      must = p >= 1 || near.mass < (p - tolerance.mass) * total || near.count == 0 ||
             near.count < unit.op_case.policy.min_tokens;
      may = p >= 1 || sure.mass < (p + tolerance.mass) * total ||
            sure.count < unit.op_case.policy.min_tokens;
      if (is_kept(unit.kept, token)) kept_mass += ranking.weight(score);
    }
    ASSERT_TRUE(!must || is_kept(unit.kept, token))
        << "token " << token << " with score " << score << " is needed to reach p = " << p;
    if (may) allowed.insert(token);
    fewest += must || unit.forced(token) ? 1 : 0;
    most += may || unit.forced(token) ? 1 : 0;
  }
  EXPECT_GE(count, fewest);
  EXPECT_LE(count, most);
  EXPECT_GE(kept_mass, (p - tolerance.mass - 1e-12) * total);
}

/// Mass of what is attended under one head's own weights, and what its tail holds of each page.
void check_masses(const Unit& unit, std::span<const double> scores, float head_mass,
                  PromiseTolerance tolerance, const StepBuffers& step, std::int64_t seq,
                  std::int64_t q_head) {
  const Ranking ranking(scores);
  const auto page_size = static_cast<std::size_t>(unit.op_case.shape.page_size);
  std::vector<double> dropped(unit.tokens.size() / page_size, 0.0);
  double kept_mass = 0;
  for (std::size_t slot = 0; slot < unit.tokens.size() && ranking.size() > 0; ++slot) {
    if (unit.tokens[slot] < 0 || !(scores[slot] > -std::numeric_limits<double>::infinity())) {
      continue;
    }
    const double weight = ranking.weight(scores[slot]);
    (is_kept(unit.kept, unit.tokens[slot]) ? kept_mass : dropped[slot / page_size]) += weight;
  }
  EXPECT_NEAR(head_mass, ranking.size() == 0 ? 0.0 : kept_mass / ranking.total(),
              tolerance.mass + 1e-6);
  if (!step.has_tail()) return;
  const float shift =
      step.tail_shift[static_cast<std::size_t>(seq * unit.op_case.shape.num_q_heads + q_head)];
  EXPECT_EQ(shift, ranking.size() == 0 ? -std::numeric_limits<float>::infinity()
                                       : static_cast<float>(ranking.top()));
  const std::span<const float> row = step.tail_row(seq, q_head);
  ASSERT_EQ(row.size(), dropped.size());
  for (std::size_t page = 0; page < row.size(); ++page) {
    // The rounding to f32, the weights' own and one sum of at most P of them.
    EXPECT_NEAR(row[page], dropped[page], dropped[page] * (0x1p-20 + 4 * tolerance.score) + 1e-37)
        << "tail of candidate page " << page;
  }
}

/// Log of the mean over the group of the heads' normalised weights. What f32 cannot hold (below
/// 2^-126) ranks behind, by the largest log weight of any head.
std::vector<double> group_scores(std::span<const std::vector<double>> heads) {
  constexpr double kBehind = 1e4;
  const std::size_t slots = heads.front().size();
  std::vector<double> mean(slots, 0.0);
  std::vector<double> largest(slots, -std::numeric_limits<double>::infinity());
  for (const std::vector<double>& scores : heads) {
    const Ranking ranking(scores);
    if (ranking.size() == 0) continue;
    for (std::size_t slot = 0; slot < slots; ++slot) {
      if (!(scores[slot] > -std::numeric_limits<double>::infinity())) continue;
      mean[slot] +=
          ranking.weight(scores[slot]) / ranking.total() / static_cast<double>(heads.size());
      largest[slot] =
          std::max(largest[slot], scores[slot] - ranking.top() - std::log(ranking.total()));
    }
  }
  for (std::size_t slot = 0; slot < slots; ++slot) {
    mean[slot] = mean[slot] >= 0x1p-126 ? std::log(mean[slot]) : largest[slot] - kBehind;
  }
  return mean;
}

/// Candidates by mass: as many of the best pages as the promise takes, no more.
void check_mass_promises(const CasePolicy& policy, std::int64_t page_size, std::int64_t n,
                         std::int64_t most, std::span<const float> scores,
                         std::span<const std::int32_t> pages, double slack) {
  double top = -std::numeric_limits<double>::infinity();
  for (const float score : scores) top = std::max(top, double{score});
  const auto mass_of = [&](std::int64_t page) {
    return std::exp(double{scores[static_cast<std::size_t>(page)]} - top);
  };
  double all = 0;
  for (std::int64_t page = 0; page < std::ssize(scores); ++page) all += mass_of(page);
  double taken = 0;
  std::int64_t num_forced = 0;
  double weakest = std::numeric_limits<double>::infinity();
  for (const std::int32_t page : pages) {
    const bool forced = policy.forced.contains_page(page, n, static_cast<int>(page_size));
    num_forced += forced ? 1 : 0;
    if (page >= std::ssize(scores)) continue;
    taken += mass_of(page);
    if (!forced) weakest = std::min(weakest, mass_of(page));
  }
  const std::int64_t floor = (policy.mass_floor + page_size - 1) / page_size;
  EXPECT_LE(std::ssize(pages), most);
  EXPECT_GE(std::ssize(pages), std::min(most, std::max(num_forced, floor)));
  if (std::ssize(pages) < most) {
    EXPECT_GE(taken, (policy.mass - slack) * all);
  }
  if (std::ssize(pages) > std::max(num_forced, floor)) {
    EXPECT_LT(taken - weakest, (policy.mass + slack) * all);
  }
}

}  // namespace

void check_select_promises(const OpCase& op_case, const PagedFixture& fixture,
                           const StepBuffers& step, PromiseTolerance tolerance) {
  const PagedKvView kv = fixture.kv();
  SelectPagesParams budget;
  budget.kv = kv;
  budget.fraction = op_case.policy.fraction;
  budget.min_tokens = op_case.policy.min_candidate_tokens;
  budget.max_tokens = op_case.policy.max_candidate_tokens;
  for (std::int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      SCOPED_TRACE(where(op_case, seq, head));
      if (!step.in_subset(seq)) {
        EXPECT_EQ(step.page_counts[static_cast<std::size_t>(step.row(seq, head))],
                  StepBuffers::kGarbage);
        continue;
      }
      const std::int64_t n = kv.seq_lens[seq];
      const std::span<const std::int32_t> pages = step.candidate_pages(seq, head);
      ASSERT_LE(std::ssize(pages), kv.total_pages(seq));
      std::int64_t num_forced = 0;
      for (std::int32_t page = 0; page < kv.total_pages(seq); ++page) {
        const bool forced = op_case.policy.forced.contains_page(page, n, kv.page_size);
        num_forced += forced ? 1 : 0;
        const bool must = forced || op_case.policy.mode == SelectMode::kAll;
        EXPECT_TRUE(!must || std::binary_search(pages.begin(), pages.end(), page))
            << "page " << page << " is missing";
      }
      for (std::size_t i = 0; i < pages.size(); ++i) {
        ASSERT_TRUE(pages[i] >= 0 && pages[i] < kv.total_pages(seq));
        ASSERT_TRUE(i == 0 || pages[i] > pages[i - 1]) << "not ascending at " << i;
      }
      if (op_case.policy.mode == SelectMode::kAll) continue;
      std::int64_t want = num_forced;
      if (op_case.policy.mode == SelectMode::kByScore) {
        want = std::max(want, std::min<std::int64_t>(kv.total_pages(seq), budget.budget_pages(n)));
      }
      const bool by_mass = op_case.policy.mode == SelectMode::kByScore && op_case.policy.mass > 0;
      if (by_mass) {
        check_mass_promises(op_case.policy, kv.page_size, n, want, step.scores_row(seq, head),
                            pages, tolerance.mass + 1e-12);
      } else {
        EXPECT_EQ(std::ssize(pages), want);
      }
      if (op_case.policy.mode != SelectMode::kByScore) continue;
      const std::span<const float> scores = step.scores_row(seq, head);
      for (const std::int32_t taken : pages) {
        if (op_case.policy.forced.contains_page(taken, n, kv.page_size)) continue;
        for (std::int32_t left = 0; left < kv.sealed_pages(seq); ++left) {
          if (std::binary_search(pages.begin(), pages.end(), left)) continue;
          const float a = scores[static_cast<std::size_t>(taken)];
          const float b = scores[static_cast<std::size_t>(left)];
          ASSERT_TRUE(a > b || (a == b && taken < left) || std::isnan(b))
              << "page " << taken << " (" << a << ") was taken before " << left << " (" << b << ")";
        }
      }
    }
  }
}

void check_prune_promises(const OpCase& op_case, const PagedFixture& fixture,
                          const StepBuffers& step, PromiseTolerance tolerance) {
  const FixtureShape& shape = fixture.shape();
  const std::int64_t group = fixture.group_size();
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    for (std::int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
      SCOPED_TRACE(where(op_case, seq, kv_head));
      const auto q_row = [&](std::int64_t g) {
        return static_cast<std::size_t>(seq * shape.num_q_heads + kv_head * group + g);
      };
      if (!step.in_subset(seq)) {
        EXPECT_EQ(step.kept_counts[static_cast<std::size_t>(step.row(seq, kv_head))],
                  StepBuffers::kGarbage);
        EXPECT_EQ(step.head_counts[q_row(0)], StepBuffers::kGarbage);
        EXPECT_TRUE(std::isnan(step.head_mass[q_row(0)]));
        continue;
      }
      const std::vector<std::int64_t> tokens = slot_tokens(
          step.candidate_pages(seq, kv_head), shape.page_size, fixture.kv().seq_lens[seq]);
      const auto num_tokens = std::count_if(tokens.begin(), tokens.end(),
                                            [](std::int64_t token) { return token >= 0; });
      ASSERT_LE(step.kept_counts[static_cast<std::size_t>(step.row(seq, kv_head))], num_tokens);
      const std::span<const std::int32_t> kept = step.kept_tokens(seq, kv_head);
      check_kept_list(op_case, fixture, seq, tokens, kept);
      if (::testing::Test::HasFatalFailure()) return;
      if (op_case.policy.criterion == PruneCriterion::kNone) {
        EXPECT_EQ(std::ssize(kept), num_tokens);
        for (std::int64_t g = 0; g < group; ++g) {
          EXPECT_EQ(step.head_counts[q_row(g)], num_tokens);
          EXPECT_EQ(step.head_mass[q_row(g)], 1.0F);
        }
        continue;
      }
      const Unit unit{op_case, fixture.kv().seq_lens[seq], tokens, kept};
      std::set<std::int64_t> allowed;
      std::vector<std::vector<double>> scores;
      float largest_p = 0;
      for (std::int64_t g = 0; g < group; ++g) {
        SCOPED_TRACE("query head " + std::to_string(g) + " of the group");
        const std::int64_t q_head = kv_head * group + g;
        const auto row = step.estimates_row(step.estimates_before_prune, seq, q_head);
        scores.emplace_back(row.begin(), row.end());
        largest_p = std::max(largest_p, step.p[q_row(g)]);
        check_masses(unit, scores.back(), step.head_mass[q_row(g)], tolerance, step, seq, q_head);
        if (op_case.policy.criterion != PruneCriterion::kPerHead) continue;
        check_set(unit, scores.back(), step.p[q_row(g)], step.head_counts[q_row(g)], tolerance,
                  allowed);
        if (::testing::Test::HasFatalFailure()) return;
      }
      if (op_case.policy.criterion == PruneCriterion::kGroupMean) {
        // Means come from sums in double here and there: equal ones may differ by their rounding.
        constexpr double kTies = 1e-11;
        check_set(unit, group_scores(scores), largest_p, step.head_counts[q_row(0)],
                  {.mass = tolerance.mass + 1e-12, .score = std::max(tolerance.score, kTies)},
                  allowed);
        if (::testing::Test::HasFatalFailure()) return;
        for (std::int64_t g = 1; g < group; ++g) {
          EXPECT_EQ(step.head_counts[q_row(g)], step.head_counts[q_row(0)]);
        }
        EXPECT_EQ(step.head_counts[q_row(0)], std::ssize(kept));
      }
      for (const std::int32_t token : kept) {
        EXPECT_TRUE(
            allowed.contains(token) ||
            op_case.policy.forced.contains(token, fixture.kv().seq_lens[seq], shape.page_size))
            << "token " << token << " is in no head's set and not forced";
      }
    }
  }
}

}  // namespace twilight::test
