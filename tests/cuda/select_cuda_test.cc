#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/host_cuda_backend.h"
#include "support/cases.h"
#include "support/paged_fixture.h"
#include "support/prune_promises.h"
#include "support/step_buffers.h"

/// Selection and pruning on the GPU. On the reference's scores candidate lists by budget equal the
/// reference's; lists by mass and kept sets may differ where f32 weights cannot tell, and keep
/// every promise within kF32Promises. The fused op equals its parts bit for bit.
namespace twilight::test {
namespace {

std::vector<OpCase> mma_cases() {
  std::vector<OpCase> cases = in_layout(without_labels(all_cases()), IndexLayout::kMma);
  // Shapes the order cannot hold.
  for (OpCase& c : in_layout(without_labels(all_cases()), IndexLayout::kTokenLanes)) {
    if (c.shape.head_dim % 32 != 0) cases.push_back(std::move(c));
  }
  return cases;
}

class SelectCuda : public ::testing::TestWithParam<OpCase> {
 protected:
  SelectCuda() {
    TestWorkspace workspace(*ref_, expected_.caps());
    expected_.run_selection(*ref_, workspace.get());
  }

  void expect_same_lists(const StepBuffers& a, const StepBuffers& b) const {
    EXPECT_EQ(a.page_counts, b.page_counts);
    EXPECT_EQ(a.kept_counts, b.kept_counts);
    EXPECT_EQ(a.head_counts, b.head_counts);
    EXPECT_EQ(
        0, std::memcmp(a.head_mass.data(), b.head_mass.data(), a.head_mass.size() * sizeof(float)));
    for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
      for (std::int32_t head = 0; a.in_subset(seq) && head < case_.shape.num_kv_heads; ++head) {
        EXPECT_TRUE(std::ranges::equal(a.candidate_pages(seq, head), b.candidate_pages(seq, head)));
        EXPECT_TRUE(std::ranges::equal(a.kept_tokens(seq, head), b.kept_tokens(seq, head)));
      }
    }
  }

  OpCase case_ = GetParam();
  PagedFixture fixture_ = case_.make_fixture();
  std::unique_ptr<Backend> ref_ = make_ref_backend();
  StepBuffers expected_{case_, fixture_};
};

TEST_P(SelectCuda, SelectPages) {
  StepBuffers actual(case_, fixture_);
  actual.scores = expected_.scores;
  TestWorkspace workspace(gpu(), actual.caps());
  gpu().select_pages(actual.select_params(), workspace.get());
  check_select_promises(case_, fixture_, actual, kF32Promises);
  if (case_.policy.mass > 0) return;
  EXPECT_EQ(actual.page_counts, expected_.page_counts);
  for (std::int32_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    for (std::int32_t head = 0; actual.in_subset(seq) && head < case_.shape.num_kv_heads; ++head) {
      EXPECT_TRUE(std::ranges::equal(actual.candidate_pages(seq, head),
                                     expected_.candidate_pages(seq, head)))
          << "sequence " << seq << ", head " << head;
    }
  }
}

TEST_P(SelectCuda, PruneTopP) {
  StepBuffers actual(case_, fixture_);
  actual.scores = expected_.scores;
  actual.pages = expected_.pages;
  actual.page_counts = expected_.page_counts;
  actual.estimates = expected_.estimates_before_prune;
  actual.estimates_before_prune = expected_.estimates_before_prune;
  TestWorkspace workspace(gpu(), actual.caps());
  gpu().prune_top_p(actual.prune_params(), workspace.get());
  check_prune_promises(case_, fixture_, actual, kF32Promises);
}

TEST_P(SelectCuda, OwnScoresKeepThePromises) {
  StepBuffers actual(case_, fixture_);
  TestWorkspace workspace(gpu(), actual.caps());
  actual.run_selection(gpu(), workspace.get());
  check_select_promises(case_, fixture_, actual, kF32Promises);
  check_prune_promises(case_, fixture_, actual, kF32Promises);
}

TEST_P(SelectCuda, FusedEqualsItsParts) {
  StepBuffers parts(case_, fixture_);
  TestWorkspace workspace(gpu(), parts.caps());
  parts.run_selection(gpu(), workspace.get());
  for (const bool own_buffers : {true, false}) {
    StepBuffers fused(case_, fixture_);
    SelectAndPruneParams params = fused.select_and_prune_params();
    if (own_buffers) {
      params.score.scores = nullptr;
      params.select.scores = nullptr;
      params.estimate.estimates = nullptr;
      params.prune.estimates = nullptr;
    }
    TestWorkspace other(gpu(), fused.caps());
    gpu().select_and_prune(params, other.get());
    expect_same_lists(fused, parts);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, SelectCuda, ::testing::ValuesIn(mma_cases()), CaseName());

class StepCuda : public ::testing::TestWithParam<OpCase> {};

TEST_P(StepCuda, LargerPKeepsSuperset) {
  if (GetParam().policy.criterion == PruneCriterion::kNone) GTEST_SKIP() << "nothing is pruned";
  check_larger_p_keeps_superset(gpu(), GetParam());
}

TEST_P(StepCuda, BatchDoesNotMatter) { check_batch_independence(gpu(), GetParam()); }

// Dense attention has a kernel of its own on tensor cores; both are close to the reference.
TEST_P(StepCuda, FullMassIsDense) {
  const bool wide = GetParam().options.distribution == Distribution::kWide;
  check_full_mass_is_dense(gpu(), GetParam(),
                           {.abs = wide ? 4e-3 : 1e-4, .rel = wide ? 4e-3 : 1e-4});
}

TEST_P(StepCuda, FullMassHasNoTail) {
  if (!GetParam().policy.tail) GTEST_SKIP() << "no tail";
  check_full_mass_has_no_tail(gpu(), GetParam());
}

INSTANTIATE_TEST_SUITE_P(Cases, StepCuda,
                         ::testing::ValuesIn(in_layout(without_labels(standard_cases()),
                                                       IndexLayout::kMma)),
                         CaseName());

}  // namespace
}  // namespace twilight::test
