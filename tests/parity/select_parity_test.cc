#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "backend/cpu/isa.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "support/cases.h"
#include "support/paged_fixture.h"
#include "support/prune_promises.h"
#include "support/step_buffers.h"

/// Selection and pruning of the CPU backend on every instruction set of this machine against the
/// scalar reference: equal candidate lists, kept sets that keep every promise and differ from the
/// reference's only where f32 cannot tell, the fused op equal to its parts bit for bit.
namespace twilight::test {
namespace {

constexpr int kThreadCounts[] = {1, 2, 3, 8};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

using Param = std::tuple<OpCase, std::string>;

class SelectParity : public ::testing::TestWithParam<Param> {
 protected:
  SelectParity()
      : case_(std::get<0>(GetParam())),
        isa_(std::get<1>(GetParam())),
        fixture_(case_.make_fixture()),
        ref_(make_ref_backend()),
        expected_(case_, fixture_) {
    for (const int threads : kThreadCounts) {
      pools_.push_back(std::make_unique<ThreadPool>(threads));
      cpus_.push_back(make_cpu_backend(*pools_.back(), isa_));
    }
    TestWorkspace workspace(*ref_, expected_.caps());
    expected_.run_selection(*ref_, workspace.get());
  }

  void SetUp() override {
    const Support support =
        cpus_[0]->supports(expected_.caps(), case_.shape.dtype, case_.shape.format);
    if (!support) GTEST_SKIP() << support.reason;
  }

  // What an op under test starts from.
  void copy_inputs(StepBuffers& to, bool with_candidates) const {
    to.scores = expected_.scores;
    if (!with_candidates) return;
    to.pages = expected_.pages;
    to.page_counts = expected_.page_counts;
    to.estimates = expected_.estimates_before_prune;
    to.estimates_before_prune = expected_.estimates_before_prune;
  }

  void expect_same_lists(const StepBuffers& a, const StepBuffers& b, bool candidates_only) const {
    EXPECT_EQ(a.page_counts, b.page_counts);
    if (!candidates_only) {
      EXPECT_EQ(a.kept_counts, b.kept_counts);
      EXPECT_EQ(a.head_counts, b.head_counts);
      EXPECT_TRUE(same_bits(a.head_mass, b.head_mass));
      EXPECT_TRUE(same_bits(a.tail_shift, b.tail_shift));
    }
    for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
      if (!a.in_subset(seq)) continue;
      for (std::int32_t head = 0; head < fixture_.shape().num_kv_heads; ++head) {
        EXPECT_TRUE(std::ranges::equal(a.candidate_pages(seq, head), b.candidate_pages(seq, head)))
            << "sequence " << seq << ", head " << head;
        if (candidates_only) continue;
        EXPECT_TRUE(std::ranges::equal(a.kept_tokens(seq, head), b.kept_tokens(seq, head)))
            << "sequence " << seq << ", head " << head;
        if (!a.has_tail()) continue;
        for (std::int32_t g = 0; g < fixture_.group_size(); ++g) {
          const std::int64_t q_head = head * fixture_.group_size() + g;
          EXPECT_TRUE(std::ranges::equal(a.tail_row(seq, q_head), b.tail_row(seq, q_head)))
              << "sequence " << seq << ", query head " << q_head;
        }
      }
    }
  }

  // The same of the group's mean weights; those that f32 cannot hold are left to the promises.
  bool undecided_mean(std::int64_t seq, std::int64_t kv_head, std::int64_t slot) const {
    const std::int32_t group = fixture_.group_size();
    std::vector<double> mean;
    double p = 0;
    for (std::int64_t q_head = kv_head * group; q_head < (kv_head + 1) * group; ++q_head) {
      const std::span<const float> row =
          expected_.estimates_row(expected_.estimates_before_prune, seq, q_head);
      mean.resize(row.size(), 0.0);
      const auto real = [](float e) { return e > -std::numeric_limits<float>::infinity(); };
      double max = -std::numeric_limits<double>::infinity();
      for (const float e : row) max = real(e) ? std::max(max, double{e}) : max;
      double total = 0;
      for (const float e : row) total += real(e) ? std::exp(e - max) : 0.0;
      for (std::size_t i = 0; i < row.size(); ++i) {
        if (real(row[i])) mean[i] += std::exp(row[i] - max) / total / group;
      }
      p = std::max(
          p,
          double{
              expected_.p[static_cast<std::size_t>(seq * fixture_.shape().num_q_heads + q_head)]});
    }
    const double here = mean[static_cast<std::size_t>(slot)];
    if (here < 0x1p-100) return true;
    double total = 0;
    double surely_heavier = 0;
    double maybe_heavier = 0;
    std::int64_t count_sure = 0;
    std::int64_t count_maybe = 0;
    for (const double w : mean) {
      total += w;
      if (w > here * (1 + kF32Promises.score)) {
        surely_heavier += w;
        ++count_sure;
      }
      if (w > here * (1 - kF32Promises.score) && w != here) {
        maybe_heavier += w;
        ++count_maybe;
      }
    }
    const bool mass = surely_heavier <= (p + kF32Promises.mass) * total &&
                      maybe_heavier >= (p - kF32Promises.mass) * total;
    const bool count = count_sure != count_maybe && count_sure < case_.policy.min_tokens &&
                       count_maybe >= case_.policy.min_tokens;
    return mass || count;
  }

  // Whether f32 may decide otherwise than double about a candidate slot of a head.
  bool undecided(std::int64_t seq, std::int64_t q_head, std::int64_t slot) const {
    const std::span<const float> row =
        expected_.estimates_row(expected_.estimates_before_prune, seq, q_head);
    double max = -std::numeric_limits<double>::infinity();
    for (const float e : row) {
      if (e > max) max = e;
    }
    const double here = row[static_cast<std::size_t>(slot)];
    double total = 0;
    double surely_heavier = 0;
    double maybe_heavier = 0;
    std::int64_t count_sure = 0;
    std::int64_t count_maybe = 0;
    for (const float e : row) {
      if (!(e > -std::numeric_limits<float>::infinity())) continue;
      const double weight = std::exp(e - max);
      total += weight;
      if (e > here + kF32Promises.score) {
        surely_heavier += weight;
        ++count_sure;
      }
      if (e > here - kF32Promises.score && static_cast<double>(e) != here) {
        maybe_heavier += weight;
        ++count_maybe;
      }
    }
    const double p =
        expected_.p[static_cast<std::size_t>(seq * fixture_.shape().num_q_heads + q_head)];
    const bool mass = surely_heavier <= (p + kF32Promises.mass) * total &&
                      maybe_heavier >= (p - kF32Promises.mass) * total;
    const bool count = count_sure != count_maybe && count_sure < case_.policy.min_tokens &&
                       count_maybe >= case_.policy.min_tokens;
    return mass || count;
  }

  OpCase case_;
  std::string isa_;
  PagedFixture fixture_;
  std::unique_ptr<Backend> ref_;
  StepBuffers expected_;
  std::vector<std::unique_ptr<ThreadPool>> pools_;
  std::vector<std::unique_ptr<Backend>> cpus_;
};

TEST_P(SelectParity, SelectPages) {
  for (const auto& cpu : cpus_) {
    StepBuffers actual(case_, fixture_);
    copy_inputs(actual, false);
    TestWorkspace workspace(*cpu, actual.caps());
    cpu->select_pages(actual.select_params(), workspace.get());
    expect_same_lists(actual, expected_, true);
    check_select_promises(case_, fixture_, actual);
  }
}

TEST_P(SelectParity, PruneTopP) {
  StepBuffers first(case_, fixture_);
  for (std::size_t i = 0; i < cpus_.size(); ++i) {
    StepBuffers other(case_, fixture_);
    StepBuffers& actual = i == 0 ? first : other;
    copy_inputs(actual, true);
    TestWorkspace workspace(*cpus_[i], actual.caps());
    cpus_[i]->prune_top_p(actual.prune_params(), workspace.get());
    if (i > 0) expect_same_lists(actual, first, false);
  }
  check_prune_promises(case_, fixture_, first, kF32Promises);

  const std::int32_t page_size = fixture_.shape().page_size;
  const std::int32_t group = fixture_.group_size();
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    if (!first.in_subset(seq)) continue;
    for (std::int32_t head = 0; head < fixture_.shape().num_kv_heads; ++head) {
      const auto a = first.kept_tokens(seq, head);
      const auto e = expected_.kept_tokens(seq, head);
      std::vector<std::int32_t> differ;
      std::ranges::set_symmetric_difference(a, e, std::back_inserter(differ));
      const auto pages = expected_.candidate_pages(seq, head);
      for (const std::int32_t token : differ) {
        const auto page = std::ranges::find(pages, token / page_size);
        ASSERT_NE(page, pages.end());
        const std::int64_t slot = (page - pages.begin()) * page_size + token % page_size;
        bool any = false;
        if (case_.policy.criterion == PruneCriterion::kGroupMean) {
          any = undecided_mean(seq, head, slot);
        } else {
          for (std::int32_t g = 0; g < group; ++g) any |= undecided(seq, head * group + g, slot);
        }
        EXPECT_TRUE(any) << "sequence " << seq << ", head " << head << ", token " << token;
      }
    }
  }
}

TEST_P(SelectParity, FusedEqualsItsParts) {
  StepBuffers parts(case_, fixture_);
  {
    TestWorkspace workspace(*cpus_[0], parts.caps());
    parts.run_selection(*cpus_[0], workspace.get());
  }
  for (const auto& cpu : cpus_) {
    for (const bool own_buffers : {true, false}) {
      StepBuffers fused(case_, fixture_);
      SelectAndPruneParams params = fused.select_and_prune_params();
      if (own_buffers) {
        params.score.scores = nullptr;
        params.select.scores = nullptr;
        params.estimate.estimates = nullptr;
        params.prune.estimates = nullptr;
      }
      TestWorkspace workspace(*cpu, fused.caps());
      cpu->select_and_prune(params, workspace.get());
      expect_same_lists(fused, parts, false);
    }
  }
}

TEST_P(SelectParity, LargerPKeepsSuperset) {
  if (case_.policy.criterion == PruneCriterion::kNone) GTEST_SKIP() << "nothing is pruned";
  check_larger_p_keeps_superset(*cpus_[1], case_);
}

TEST_P(SelectParity, OneSequenceAtATime) {
  OpCase all = case_;
  all.subset = false;
  StepBuffers together(all, fixture_);
  StepBuffers alone(all, fixture_);
  TestWorkspace workspace(*cpus_[3], together.caps());
  cpus_[3]->select_and_prune(together.select_and_prune_params(), workspace.get());
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    alone.set_subset({seq});
    cpus_[0]->select_and_prune(alone.select_and_prune_params(), workspace.get());
  }
  expect_same_lists(together, alone, false);
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

INSTANTIATE_TEST_SUITE_P(Cases, SelectParity,
                         ::testing::Combine(::testing::ValuesIn(all_cases()),
                                            ::testing::ValuesIn(isa_names())),
                         [](const auto& param) {
                           return std::get<0>(param.param).name + "_" + std::get<1>(param.param);
                         });

}  // namespace
}  // namespace twilight::test
