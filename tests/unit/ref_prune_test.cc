// Selection and pruning of the reference backend on rows written by hand.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "ops/backend.h"
#include "support/cases.h"
#include "support/step_buffers.h"

namespace twilight::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class RefPrune : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> ref_ = make_ref_backend();
};

/// One sequence, one head, P = 4: prune on rows written by hand.
struct HandPrune {
  explicit HandPrune(std::vector<float> scores, float p, std::int32_t min_tokens = 0,
                     ForcedTokens forced = {})
      : n(static_cast<std::int32_t>(scores.size())),
        estimates(std::move(scores)),
        p_value(p),
        min(min_tokens),
        forced_tokens(forced) {
    page_count = (n + 3) / 4;
    for (std::int32_t i = 0; i < page_count; ++i) pages.push_back(i);
    estimates.resize(static_cast<std::size_t>(4 * page_count + 15) / 16 * 16, -kInf);
  }
  std::vector<std::int32_t> run(Backend& backend) {
    PruneParams params;
    params.seqs.count = 1;
    params.kv.num_seqs = 1;
    params.kv.num_kv_heads = 1;
    params.kv.head_dim = 8;
    params.kv.page_size = 4;
    params.kv.seq_lens = &n;
    params.num_q_heads = 1;
    params.forced = forced_tokens;
    params.min_tokens = min;
    params.p = &p_value;
    params.pages = pages.data();
    params.page_counts = &page_count;
    params.candidate_stride = page_count;
    params.estimates = estimates.data();
    params.estimate_stride = std::ssize(estimates);
    std::vector<std::int32_t> kept(static_cast<std::size_t>(4 * page_count), -7);
    params.kept = kept.data();
    params.kept_counts = &kept_count;
    params.kept_stride = std::ssize(kept);
    params.head_counts = &head_count;
    params.head_mass = &head_mass;
    backend.prune_top_p(params, {});
    kept.resize(static_cast<std::size_t>(kept_count));
    return kept;
  }
  std::int32_t n;
  std::vector<float> estimates;
  float p_value;
  std::int32_t min;
  ForcedTokens forced_tokens;
  std::int32_t page_count = 0;
  std::vector<std::int32_t> pages;
  std::int32_t kept_count = -7;
  std::int32_t head_count = -7;
  float head_mass = -7;
};

using Tokens = std::vector<std::int32_t>;

TEST_F(RefPrune, PruneByHand) {
  const float l2 = std::log(2.0F);
  // Weights 1, 2, 4, 1 of 8.
  const std::vector<float> scores = {0.0F, l2, 2 * l2, 0.0F};
  HandPrune half(scores, 0.4F);
  EXPECT_EQ(half.run(*ref_), (Tokens{2}));
  EXPECT_FLOAT_EQ(half.head_mass, 0.5F);
  EXPECT_EQ(HandPrune(scores, 0.6F).run(*ref_), (Tokens{1, 2}));
  HandPrune tied(scores, 0.8F);
  EXPECT_EQ(tied.run(*ref_), (Tokens{0, 1, 2, 3}));  // both of weight 1
  EXPECT_EQ(tied.head_count, 4);
  EXPECT_FLOAT_EQ(tied.head_mass, 1.0F);
  EXPECT_EQ(HandPrune(scores, 0.4F, 2).run(*ref_), (Tokens{1, 2}));
  EXPECT_EQ(HandPrune(scores, 0.4F, 3).run(*ref_), (Tokens{0, 1, 2, 3}));
  // The sink is kept but takes no place in the set.
  HandPrune forced(scores, 0.4F, 0, {.sink_tokens = 1});
  EXPECT_EQ(forced.run(*ref_), (Tokens{0, 2}));
  EXPECT_EQ(forced.head_count, 2);
  EXPECT_FLOAT_EQ(forced.head_mass, 0.625F);
  // The open page (tokens 4, 5) is forced whatever its weight.
  EXPECT_EQ(HandPrune({5.0F, 0, 0, 0, -9.0F, -9.0F}, 0.5F).run(*ref_), (Tokens{0, 4, 5}));
}

TEST_F(RefPrune, PruneSpecialValues) {
  EXPECT_EQ(HandPrune({-kInf, 1.0F, kNan, 0.0F}, 1.0F).run(*ref_), (Tokens{1, 3}));
  EXPECT_EQ(HandPrune({-kInf, 1.0F, kNan, -200.0F}, 1.0F).run(*ref_), (Tokens{1, 3}));
  EXPECT_EQ(HandPrune({kNan, 1.0F, -kInf, 0.0F}, 0.5F, 4).run(*ref_), (Tokens{1, 3}));
  HandPrune nothing({-kInf, -kInf, kNan, -kInf}, 0.5F, 2, {.sink_tokens = 1});
  EXPECT_EQ(nothing.run(*ref_), (Tokens{0}));
  EXPECT_EQ(nothing.head_mass, 0.0F);
  EXPECT_EQ(HandPrune({1.0F, kInf, 2.0F, kInf}, 0.9F).run(*ref_), (Tokens{1, 3}));
  // The row's maximum is not its first element.
  EXPECT_EQ(HandPrune({-1000.0F, 1000.0F, 999.0F, 0.0F}, 0.9F).run(*ref_), (Tokens{1, 2}));
}

TEST_F(RefPrune, SelectRanksNanLast) {
  OpCase c = correctness_cases()[0];
  c.shape.num_q_heads = c.shape.num_kv_heads = 2;
  c.policy.forced = {};
  c.policy.fraction = 0;
  c.shape.lengths = {96};
  c.policy.min_candidate_tokens = c.policy.max_candidate_tokens = 64;
  PagedFixture fixture = c.make_fixture();
  StepBuffers step(c, fixture);
  for (std::int64_t h = 0; h < 2; ++h) {
    const float row[] = {kNan, 1.0F, -kInf, kNan, 3.0F, 1.0F};
    std::copy(std::begin(row), std::end(row), step.scores.begin() + h * step.page_stride);
  }
  ref_->select_pages(step.select_params(), {});
  const std::span<const std::int32_t> pages = step.candidate_pages(0, 0);
  EXPECT_EQ(Tokens(pages.begin(), pages.end()), (Tokens{1, 2, 4, 5}));
}

}  // namespace
}  // namespace twilight::test
