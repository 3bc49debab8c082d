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
  explicit Ranking(std::span<const float> scores) {
    for (const float s : scores) {
      if (s > -std::numeric_limits<float>::infinity()) sorted_.push_back(s);
    }
    std::sort(sorted_.begin(), sorted_.end(), std::greater<>());
    prefix_.push_back(0.0);
    for (const double s : sorted_) prefix_.push_back(prefix_.back() + weight(s));
  }

  [[nodiscard]] double weight(double score) const {
    return score == sorted_.front() ? 1.0 : std::exp(score - sorted_.front());
  }
  [[nodiscard]] double total() const { return prefix_.back(); }
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

struct HeadRow {
  std::span<const float> scores;
  float p = 0;
  std::int32_t count = 0;
  float mass = 0;
};

/// Checks one head and marks in `allowed` the tokens it may have put into the union.
void check_head(const OpCase& op_case, const PagedFixture& fixture, std::int64_t seq,
                std::span<const std::int64_t> tokens, std::span<const std::int32_t> kept,
                const HeadRow& row, PromiseTolerance tolerance, std::set<std::int64_t>& allowed) {
  const std::int64_t n = fixture.kv().seq_lens[seq];
  const Ranking ranking(row.scores);
  if (ranking.size() == 0) {
    EXPECT_EQ(row.mass, 0.0F);
    return;
  }
  const double p = row.p;
  const double total = ranking.total();
  double kept_mass = 0;
  std::int64_t fewest = 0;
  std::int64_t most = 0;
  for (std::size_t slot = 0; slot < tokens.size(); ++slot) {
    const std::int64_t token = tokens[slot];
    if (token < 0) continue;
    const double score = row.scores[slot];
    const bool forced = op_case.policy.forced.contains(token, n, fixture.shape().page_size);
    bool must = false;
    bool may = false;
    if (score > -std::numeric_limits<double>::infinity()) {
      const auto near = ranking.above_or_near(score, tolerance.score);
      const auto sure = ranking.above(score + tolerance.score);
      must = p >= 1 || near.mass < (p - tolerance.mass) * total || near.count == 0 ||
             near.count < op_case.policy.min_tokens;
      may = p >= 1 || sure.mass < (p + tolerance.mass) * total ||
            sure.count < op_case.policy.min_tokens;
      if (is_kept(kept, token)) kept_mass += ranking.weight(score);
    }
    ASSERT_TRUE(!must || is_kept(kept, token))
        << "token " << token << " with score " << score << " is needed to reach p = " << p;
    if (may) allowed.insert(token);
    fewest += must || forced ? 1 : 0;
    most += may || forced ? 1 : 0;
  }
  EXPECT_GE(row.count, fewest);
  EXPECT_LE(row.count, most);
  EXPECT_NEAR(row.mass, kept_mass / total, tolerance.mass + 1e-6);
  EXPECT_GE(kept_mass, (p - tolerance.mass - 1e-12) * total);
}

/// One step with its own buffers.
struct StepRun {
  StepRun(Backend& backend, const OpCase& op_case, const PagedFixture& fixture)
      : step(op_case, fixture), workspace(backend, step.caps()) {
    step.run_selection(backend, workspace.get());
    backend.attend_sparse(step.attend_sparse_params(), workspace.get());
  }
  StepBuffers step;
  TestWorkspace workspace;
};

template <typename T>
bool same_bits(std::span<const T> a, std::span<const T> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

void expect_same_sequence(const OpCase& op_case, const PagedFixture& fixture, const StepBuffers& a,
                          std::int64_t seq_a, const StepBuffers& b, std::int64_t seq_b) {
  const FixtureShape& shape = fixture.shape();
  for (std::int64_t head = 0; head < shape.num_kv_heads; ++head) {
    SCOPED_TRACE(where(op_case, seq_a, head));
    EXPECT_TRUE(same_bits(a.candidate_pages(seq_a, head), b.candidate_pages(seq_b, head)));
    EXPECT_TRUE(same_bits(a.kept_tokens(seq_a, head), b.kept_tokens(seq_b, head)));
  }
  for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
    SCOPED_TRACE(where(op_case, seq_a, head));
    const auto row_a = static_cast<std::size_t>(seq_a * shape.num_q_heads + head);
    const auto row_b = static_cast<std::size_t>(seq_b * shape.num_q_heads + head);
    EXPECT_EQ(a.head_counts[row_a], b.head_counts[row_b]);
    EXPECT_EQ(a.head_mass[row_a], b.head_mass[row_b]);
    EXPECT_TRUE(same_bits(a.out_row(seq_a, head), b.out_row(seq_b, head)));
  }
}

}  // namespace

void check_select_promises(const OpCase& op_case, const PagedFixture& fixture,
                           const StepBuffers& step) {
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
      EXPECT_EQ(std::ssize(pages), want);
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
      std::set<std::int64_t> allowed;
      for (std::int64_t g = 0; g < group; ++g) {
        SCOPED_TRACE("query head " + std::to_string(g) + " of the group");
        const std::int64_t q_head = kv_head * group + g;
        check_head(op_case, fixture, seq, tokens, kept,
                   {.scores = step.estimates_row(step.estimates_before_prune, seq, q_head),
                    .p = step.p[q_row(g)],
                    .count = step.head_counts[q_row(g)],
                    .mass = step.head_mass[q_row(g)]},
                   tolerance, allowed);
        if (::testing::Test::HasFatalFailure()) return;
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

void check_larger_p_keeps_superset(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase varied = op_case;
  varied.policy.mixed_p = false;
  std::vector<std::vector<std::int32_t>> before;
  for (const float p : {1e-6F, 0.3F, 0.7F, 0.9F, 0.99F, 0.9999F, 1.0F}) {
    varied.policy.p = p;
    const StepRun run(backend, varied, fixture);
    std::vector<std::vector<std::int32_t>> now;
    for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
      for (std::int64_t head = 0; head < fixture.shape().num_kv_heads; ++head) {
        now.emplace_back();
        if (!run.step.in_subset(seq)) continue;
        const std::span<const std::int32_t> kept = run.step.kept_tokens(seq, head);
        now.back().assign(kept.begin(), kept.end());
        if (before.empty()) continue;
        const std::vector<std::int32_t>& smaller = before[now.size() - 1];
        EXPECT_TRUE(std::includes(kept.begin(), kept.end(), smaller.begin(), smaller.end()))
            << where(op_case, seq, head) << ", p " << p;
      }
    }
    before = std::move(now);
  }
}

void check_batch_independence(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase all = op_case;
  all.subset = false;
  StepRun together(backend, all, fixture);

  StepBuffers alone(all, fixture);
  TestWorkspace workspace(backend, alone.caps());
  for (std::int32_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    alone.set_subset({seq});
    alone.run_selection(backend, workspace.get());
    backend.attend_sparse(alone.attend_sparse_params(), workspace.get());
  }

  OpCase turned_case = all;
  std::reverse(turned_case.shape.lengths.begin(), turned_case.shape.lengths.end());
  turned_case.options.shared_prefix_pages = 0;
  turned_case.options.seed += 1000;
  PagedFixture turned_fixture = turned_case.make_fixture();
  const std::int32_t last = fixture.num_seqs() - 1;
  for (std::int32_t seq = 0; seq <= last; ++seq) {
    for (std::int32_t h = 0; h < fixture.shape().num_kv_heads; ++h) {
      for (std::int32_t t = 0; t < fixture.kv().seq_lens[seq]; ++t) {
        turned_fixture.set_k(last - seq, t, h, fixture.k_row(seq, t, h));
        turned_fixture.set_v(last - seq, t, h, fixture.v_row(seq, t, h));
      }
    }
    for (std::int32_t h = 0; h < fixture.shape().num_q_heads; ++h) {
      turned_fixture.set_q(last - seq, h, fixture.q_row(seq, h));
    }
  }
  turned_fixture.seal();
  StepBuffers turned(turned_case, turned_fixture);
  const auto heads = static_cast<std::ptrdiff_t>(fixture.shape().num_q_heads);
  for (std::ptrdiff_t seq = 0; seq <= last; ++seq) {
    std::copy_n(together.step.p.begin() + seq * heads, heads,
                turned.p.begin() + (last - seq) * heads);
  }
  turned.run_selection(backend, workspace.get());
  backend.attend_sparse(turned.attend_sparse_params(), workspace.get());

  for (std::int32_t seq = 0; seq <= last; ++seq) {
    expect_same_sequence(op_case, fixture, together.step, seq, alone, seq);
    expect_same_sequence(op_case, fixture, together.step, seq, turned, last - seq);
  }
}

void check_full_mass_is_dense(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  OpCase full = op_case;
  full.policy.mode = SelectMode::kAll;
  full.policy.p = 1.0F;
  full.policy.mixed_p = false;
  StepRun sparse(backend, full, fixture);
  StepBuffers dense(full, fixture);
  backend.attend_dense(dense.attend_dense_params(), sparse.workspace.get());
  for (std::int64_t seq = 0; seq < fixture.num_seqs(); ++seq) {
    if (!sparse.step.in_subset(seq)) continue;
    for (std::int64_t head = 0; head < fixture.shape().num_q_heads; ++head) {
      EXPECT_TRUE(same_bits(sparse.step.out_row(seq, head), dense.out_row(seq, head)))
          << where(op_case, seq, head);
    }
  }
}

}  // namespace twilight::test
