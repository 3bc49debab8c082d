#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "ops/backend.h"
#include "support/prune_promises.h"

namespace twilight::test {
namespace {

/// Double sums in another order, rounded to f32.
constexpr Tolerance kRounding{.abs = 1e-6, .rel = 1e-6, .cosine = 1e-9};

void check_step(Backend& backend, const OpCase& op_case) {
  const PagedFixture fixture = op_case.make_fixture();
  StepBuffers step(op_case, fixture);
  step.run_selection(backend, {});
  check_select_promises(op_case, fixture, step);
  check_prune_promises(op_case, fixture, step, {});
  backend.attend_sparse(step.attend_sparse_params(), {});
  check_attention(op_case, fixture, step, kRounding);
}

class RefPromises : public ::testing::TestWithParam<OpCase> {
 protected:
  std::unique_ptr<Backend> backend_ = make_ref_backend();
};

TEST_P(RefPromises, SelectPruneAndAttend) { check_step(*backend_, GetParam()); }

TEST_P(RefPromises, LargerPKeepsSuperset) { check_larger_p_keeps_superset(*backend_, GetParam()); }

TEST_P(RefPromises, BatchDoesNotMatter) { check_batch_independence(*backend_, GetParam()); }

TEST_P(RefPromises, FullMassIsDense) { check_full_mass_is_dense(*backend_, GetParam()); }

TEST_P(RefPromises, FullMassHasNoTail) {
  if (GetParam().policy.tail) check_full_mass_has_no_tail(*backend_, GetParam());
}

// The whole step in one call, and with the other order of codes: the same bits.
TEST_P(RefPromises, LayoutAndFusionDoNotMatter) {
  const PagedFixture fixture = GetParam().make_fixture();
  StepBuffers step(GetParam(), fixture);
  step.run_selection(*backend_, {});
  backend_->attend_sparse(step.attend_sparse_params(), {});
  const auto same = [&](StepBuffers& other) {
    EXPECT_EQ(step.kept, other.kept);
    EXPECT_EQ(step.kept_counts, other.kept_counts);
    EXPECT_EQ(step.head_counts, other.head_counts);
    const auto same_floats = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    EXPECT_TRUE(same_floats(step.scores, other.scores));
    EXPECT_TRUE(same_floats(step.head_mass, other.head_mass));
    EXPECT_TRUE(same_floats(step.tail_mass, other.tail_mass));
    EXPECT_TRUE(same_floats(step.tail_shift, other.tail_shift));
    EXPECT_TRUE(same_floats(step.out, other.out));
  };
  StepBuffers fused(GetParam(), fixture);
  backend_->sparse_step(fused.sparse_step_params(), {});
  same(fused);
  for (const OpCase& turned : in_layout({GetParam()}, IndexLayout::kMma)) {
    const PagedFixture other = turned.make_fixture();
    StepBuffers fragments(turned, other);
    fragments.run_selection(*backend_, {});
    backend_->attend_sparse(fragments.attend_sparse_params(), {});
    same(fragments);
    EXPECT_EQ(step.estimates_before_prune.size(), fragments.estimates_before_prune.size());
    EXPECT_EQ(
        std::memcmp(step.estimates_before_prune.data(), fragments.estimates_before_prune.data(),
                    step.estimates_before_prune.size() * sizeof(float)),
        0);
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, RefPromises, ::testing::ValuesIn(standard_cases()), CaseName());

class RefLargePromises : public ::testing::TestWithParam<OpCase> {};

TEST_P(RefLargePromises, SelectPruneAndAttend) { check_step(*make_ref_backend(), GetParam()); }

INSTANTIATE_TEST_SUITE_P(Cases, RefLargePromises, ::testing::ValuesIn(large_cases()), CaseName());

// Every option with every other: selector and bits name the test, the rest runs inside.
struct SelectorKind {
  const char* name;
  SelectMode mode;
  SummaryKind summary;
};
constexpr SelectorKind kSelectors[] = {
    {"full", SelectMode::kAll, SummaryKind::kNone},
    {"quest", SelectMode::kByScore, SummaryKind::kQuestBf16},
    {"quest4", SelectMode::kByScore, SummaryKind::kQuest4},
    {"centroid", SelectMode::kByScore, SummaryKind::kCentroid},
    {"sub_centroid", SelectMode::kByScore, SummaryKind::kSubCentroid},
    {"half_centroid", SelectMode::kByScore, SummaryKind::kHalfCentroid},
    {"labels", SelectMode::kByScore, SummaryKind::kLabels},
    {"streaming", SelectMode::kForcedOnly, SummaryKind::kNone}};

class RefOptions : public ::testing::TestWithParam<std::tuple<int, int>> {
 protected:
  template <typename Body>
  void for_all_options(const Body& body) {
    const SelectorKind& selector = kSelectors[std::get<0>(GetParam())];
    const int bits = std::get<1>(GetParam());
    const bool masses = num_centroids(selector.summary) > 0;
    std::uint64_t seed = 1000;
    for (const std::int32_t page_size : {1, 5, 16, 64}) {
      for (const std::int32_t group : {1, 3, 4, 8}) {
        // Half of the pairs here, the other half with the next number of bits.
        if ((page_size + group / 3 + std::countr_zero(static_cast<unsigned>(bits))) % 2 == 0)
          continue;
        for (const PruneCriterion criterion :
             {PruneCriterion::kPerHead, PruneCriterion::kGroupMean}) {
          for (const bool tail : {false, true}) {
            for (const double mass : {0.0, 0.5, 0.95}) {
              if (mass > 0 && !masses) continue;
              OpCase c;
              c.name = std::string(selector.name) + ", bits " + std::to_string(bits) + ", page " +
                       std::to_string(page_size) + ", group " + std::to_string(group) +
                       (criterion == PruneCriterion::kPerHead ? ", per head" : ", group mean") +
                       (tail ? ", tail" : "") + ", mass " + std::to_string(mass);
              c.shape = {.lengths = {2 * page_size + 41, page_size, 96},
                         .num_q_heads = 2 * group,
                         .num_kv_heads = 2,
                         .head_dim = 32,
                         .page_size = page_size,
                         .dtype = DType::kBf16,
                         .format = {selector.summary, bits == 16 ? 0 : bits, tail ? 4 : 0}};
              if (selector.summary == SummaryKind::kLabels) c.shape.format.label_channels = 16;
              constexpr Distribution kKinds[] = {Distribution::kPlanted, Distribution::kNormal,
                                                 Distribution::kTiedGroups};
              c.options.seed = ++seed;
              c.options.distribution = kKinds[seed % std::size(kKinds)];
              c.policy.mode = selector.mode;
              c.policy.fraction = 0.6;
              c.policy.min_candidate_tokens = 2 * page_size;
              c.policy.mass = mass;
              c.policy.mass_floor = seed % 2 == 0 ? 0 : 24;
              c.policy.criterion = criterion;
              c.policy.min_tokens = seed % 5 == 0 ? 12 : 1;
              c.policy.exact_keys = bits == 16;
              c.policy.tail = tail;
              c.policy.far_tail = tail && masses && seed % 3 != 0;
              c.policy.far_floor = seed % 2 == 0 ? 0.2F : 0.0F;
              body(c);
              if (HasFailure()) return;
            }
          }
        }
      }
    }
  }

  std::unique_ptr<Backend> backend_ = make_ref_backend();
};

TEST_P(RefOptions, Promises) {
  for_all_options([&](OpCase& c) {
    for (const float p : {0.2F, 0.9F, 1.0F}) {
      c.policy.p = p;
      check_step(*backend_, c);
    }
    c.policy.mixed_p = true;
    check_step(*backend_, c);
  });
}

TEST_P(RefOptions, SupersetsBatchesAndFullMass) {
  for_all_options([&](OpCase& c) {
    check_larger_p_keeps_superset(*backend_, c);
    c.policy.mixed_p = true;
    check_batch_independence(*backend_, c);
    check_full_mass_is_dense(*backend_, c);
    if (c.policy.tail) check_full_mass_has_no_tail(*backend_, c);
  });
}

INSTANTIATE_TEST_SUITE_P(Product, RefOptions,
                         ::testing::Combine(::testing::Range(0, 7), ::testing::Values(2, 4, 8, 16)),
                         [](const auto& param) {
                           return std::string(kSelectors[std::get<0>(param.param)].name) + "_bits" +
                                  std::to_string(std::get<1>(param.param));
                         });

}  // namespace
}  // namespace twilight::test
