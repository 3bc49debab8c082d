#include "twilight/policy.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "sparse/decode_step.h"
#include "sparse/selector.h"
#include "support/expect_error.h"

namespace twilight::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(Policy, Presets) {
  const SparsePolicy dense = make_policy("dense");
  EXPECT_TRUE(dense.is_dense());
  EXPECT_EQ(dense.name, "dense");

  const SparsePolicy paper = make_policy("paper");
  EXPECT_EQ(paper.selector, "quest");
  EXPECT_TRUE(paper.prune);
  EXPECT_EQ(paper.candidate_fraction, 0.25);
  EXPECT_EQ(paper.min_candidates, 1024);
  EXPECT_EQ(paper.max_candidates, 8192);
  EXPECT_EQ(paper.p, 0.95F);
  EXPECT_EQ(paper.key_bits, 4);
  EXPECT_EQ(paper.summary_bits, 16);
  EXPECT_EQ(paper.dense_layers, 2);
  EXPECT_EQ(paper.dense_below_tokens, SparsePolicy::kDenseBelowAuto);
  EXPECT_EQ(index_format_of(paper),
            (IndexFormat{.summary = SummaryKind::kQuestBf16, .key_bits = 4}));

  EXPECT_EQ(paper.criterion, "per_head");
  EXPECT_FALSE(paper.tail);
  EXPECT_FALSE(paper.far_tail);
  EXPECT_EQ(paper.candidate_mass, 0);

  const SparsePolicy adaptive = make_policy("adaptive");
  EXPECT_EQ(adaptive.name, "adaptive");
  EXPECT_EQ(adaptive.selector, "sub_centroid");
  EXPECT_TRUE(adaptive.prune);
  EXPECT_EQ(adaptive.criterion, "group_mean");
  EXPECT_TRUE(adaptive.tail);
  EXPECT_EQ(adaptive.key_bits, 2);
  EXPECT_EQ(adaptive.dense_layers, 2);
  EXPECT_GT(adaptive.p, 0.5F);
  EXPECT_LT(adaptive.p, 1.0F);
  EXPECT_EQ(index_format_of(adaptive),
            (IndexFormat{.summary = SummaryKind::kSubCentroid, .key_bits = 2, .value_bits = 4}));

  const SparsePolicy full = make_policy("paper-full");
  EXPECT_EQ(full.selector, "full");
  EXPECT_TRUE(full.prune);
  EXPECT_EQ(index_format_of(full), (IndexFormat{.summary = SummaryKind::kNone, .key_bits = 4}));

  const SparsePolicy quest = make_policy("quest:2048");
  EXPECT_EQ(quest.name, "quest:2048");
  EXPECT_EQ(quest.selector, "quest");
  EXPECT_FALSE(quest.prune);
  EXPECT_EQ(quest.candidate_fraction, 0);
  EXPECT_EQ(quest.min_candidates, 2048);
  EXPECT_EQ(quest.max_candidates, 2048);
  EXPECT_EQ(index_format_of(quest),
            (IndexFormat{.summary = SummaryKind::kQuestBf16, .key_bits = 0}));

  const SparsePolicy streaming = make_policy("streaming");
  EXPECT_EQ(streaming.selector, "streaming");
  EXPECT_FALSE(streaming.prune);
  EXPECT_EQ(index_format_of(streaming),
            (IndexFormat{.summary = SummaryKind::kNone, .key_bits = 0}));

  for (const std::string& name : policy_names()) {
    EXPECT_NO_THROW(validate_policy(make_policy(name == "quest:K" ? "quest:64" : name))) << name;
  }
}

TEST(Policy, IndexFollowsTheBits) {
  SparsePolicy policy = make_policy("paper");
  policy.summary_bits = 4;
  policy.key_bits = 8;
  EXPECT_EQ(index_format_of(policy), (IndexFormat{.summary = SummaryKind::kQuest4, .key_bits = 8}));
  policy.key_bits = 16;  // the keys themselves
  EXPECT_EQ(index_format_of(policy), (IndexFormat{.summary = SummaryKind::kQuest4, .key_bits = 0}));
  policy.key_bits = 2;  // centred on a mean of its own
  EXPECT_EQ(index_format_of(policy), (IndexFormat{.summary = SummaryKind::kQuest4, .key_bits = 2}));
  policy.selector = "sub_centroid";
  policy.tail = true;
  EXPECT_EQ(index_format_of(policy),
            (IndexFormat{.summary = SummaryKind::kSubCentroid, .key_bits = 2, .value_bits = 4}));
  policy.prune = false;  // neither estimates nor what was dropped of them
  EXPECT_EQ(index_format_of(policy),
            (IndexFormat{.summary = SummaryKind::kSubCentroid, .key_bits = 0}));
  policy.prune = true;
  policy.tail = false;
  policy.selector = "oracle";
  policy.key_bits = 4;
  EXPECT_EQ(index_format_of(policy), (IndexFormat{.summary = SummaryKind::kNone, .key_bits = 4}));
  EXPECT_EQ(index_format_of(make_policy("dense")),
            (IndexFormat{.summary = SummaryKind::kNone, .key_bits = 0}));
}

TEST(Policy, UnknownPresets) {
  for (const std::string name : {"", "Paper", "sparse", "questK", "full", "paper "}) {
    expect_error(
        ErrorCode::kInvalidArgument,
        {"[attention]", "'" + name + "'", "dense, adaptive, paper, paper-full, quest:K, streaming"},
        [&] { (void)make_policy(name); });
  }
  for (const std::string budget : {"", "0", "-5", "x", "12x", " 5", "1e3", "99999999999"}) {
    expect_error(ErrorCode::kInvalidArgument,
                 {"[attention]", "quest:K", "'quest:" + budget + "'", "1 to 1073741824"},
                 [&] { (void)make_policy("quest:" + budget); });
  }
}

TEST(Policy, EveryBadFieldIsNamed) {
  struct Bad {
    std::string field;
    std::function<void(SparsePolicy&)> edit;
  };
  const std::vector<Bad> bads = {
      {"selector, got 'best', accepted dense, full, quest, centroid, half_centroid, sub_centroid, "
       "double_sparsity, streaming, oracle",
       [](SparsePolicy& p) { p.selector = "best"; }},
      {"] p, got 0", [](SparsePolicy& p) { p.p = 0; }},
      {"] p, got 1.5", [](SparsePolicy& p) { p.p = 1.5F; }},
      {"] p, got nan", [](SparsePolicy& p) { p.p = kNan; }},
      {"layer_p[1], got -1",
       [](SparsePolicy& p) {
         p.layer_p = {1, -1};
       }},
      {"layer_p[0], got nan", [](SparsePolicy& p) { p.layer_p = {kNan}; }},
      {"candidate_fraction, got -0.1", [](SparsePolicy& p) { p.candidate_fraction = -0.1; }},
      {"candidate_fraction, got 1.1", [](SparsePolicy& p) { p.candidate_fraction = 1.1; }},
      {"candidate_fraction, got nan",
       [](SparsePolicy& p) { p.candidate_fraction = std::numeric_limits<double>::quiet_NaN(); }},
      {"min_candidates, got -1", [](SparsePolicy& p) { p.min_candidates = -1; }},
      {"max_candidates, got 1023, accepted 1024",
       [](SparsePolicy& p) { p.max_candidates = p.min_candidates - 1; }},
      {"max_candidates, got 2147483647", [](SparsePolicy& p) { p.max_candidates = 0x7fffffff; }},
      {"min_tokens, got -1", [](SparsePolicy& p) { p.min_tokens = -1; }},
      {"sink_tokens, got -1", [](SparsePolicy& p) { p.sink_tokens = -1; }},
      {"recent_pages, got -1", [](SparsePolicy& p) { p.recent_pages = -1; }},
      {"dense_layers, got -1", [](SparsePolicy& p) { p.dense_layers = -1; }},
      {"dense_below_tokens, got -2", [](SparsePolicy& p) { p.dense_below_tokens = -2; }},
      {"candidate_mass, got -0.1", [](SparsePolicy& p) { p.candidate_mass = -0.1; }},
      {"candidate_mass, got 1", [](SparsePolicy& p) { p.candidate_mass = 1; }},
      {"candidate_mass, got nan",
       [](SparsePolicy& p) { p.candidate_mass = std::numeric_limits<double>::quiet_NaN(); }},
      {"candidate_mass with selector 'quest', accepted centroid, half_centroid, sub_centroid",
       [](SparsePolicy& p) { p.candidate_mass = 0.5; }},
      {"candidate_mass with selector 'full'",
       [](SparsePolicy& p) {
         p.selector = "full";
         p.candidate_mass = 0.5;
       }},
      {"criterion, got 'mean', accepted per_head, group_mean",
       [](SparsePolicy& p) { p.criterion = "mean"; }},
      {"criterion, got ''", [](SparsePolicy& p) { p.criterion.clear(); }},
      {"tail without pruning",
       [](SparsePolicy& p) {
         p.tail = true;
         p.prune = false;
       }},
      {"far_tail with tail off and selector 'centroid'",
       [](SparsePolicy& p) {
         p.selector = "centroid";
         p.far_tail = true;
       }},
      {"far_tail with tail on and selector 'quest'",
       [](SparsePolicy& p) { p.tail = p.far_tail = true; }},
      {"far_floor, got -1", [](SparsePolicy& p) { p.far_floor = -1; }},
      {"far_floor, got nan", [](SparsePolicy& p) { p.far_floor = kNan; }},
      {"key_bits, got 5, accepted 2, 4, 8, 16", [](SparsePolicy& p) { p.key_bits = 5; }},
      {"key_bits, got 0", [](SparsePolicy& p) { p.key_bits = 0; }},
      {"selector double_sparsity without label channels, accepted a profile",
       [](SparsePolicy& p) { p.selector = "double_sparsity"; }},
      {"num_labels, got 12, accepted multiples of 16 up to 128",
       [](SparsePolicy& p) {
         p.selector = "double_sparsity";
         p.num_labels = 12;
       }},
      {"labels, got 15 channels",
       [](SparsePolicy& p) {
         p.selector = "double_sparsity";
         p.num_labels = 16;
         p.labels.resize(15);
       }},
      {"labels[1], got 0, accepted 1",
       [](SparsePolicy& p) {
         p.selector = "double_sparsity";
         p.num_labels = 16;
         p.labels.resize(16);
       }},
      {"summary_bits, got 8, accepted 4, 16", [](SparsePolicy& p) { p.summary_bits = 8; }},
  };
  for (const Bad& bad : bads) {
    SCOPED_TRACE(bad.field);
    SparsePolicy policy = make_policy("paper");
    bad.edit(policy);
    expect_error(ErrorCode::kInvalidArgument, {"[policy]", bad.field, "accepted "},
                 [&] { validate_policy(policy); });
  }
  for (const char* selector : {"centroid", "half_centroid", "sub_centroid"}) {
    SparsePolicy policy = make_policy("adaptive");
    policy.selector = selector;
    policy.candidate_mass = 0.999;
    policy.far_tail = true;
    EXPECT_NO_THROW(validate_policy(policy));
  }
  // A dense policy ignores the rest.
  SparsePolicy dense = make_policy("dense");
  dense.p = 0;
  dense.key_bits = 5;
  EXPECT_NO_THROW(validate_policy(dense));
}

TEST(Policy, ProbabilityOfLayers) {
  SparsePolicy policy = make_policy("paper");
  policy.layer_p = {0.5F, 0.75F};
  EXPECT_EQ(policy.p_of_layer(0), 0.5F);
  EXPECT_EQ(policy.p_of_layer(1), 0.75F);
  EXPECT_EQ(policy.p_of_layer(2), 0.95F);
}

TEST(Selector, Names) {
  for (const char* name :
       {"full", "quest", "centroid", "half_centroid", "sub_centroid", "streaming", "oracle"}) {
    SparsePolicy policy = make_policy("paper");
    policy.selector = name;
    EXPECT_EQ(make_selector(policy)->name(), name);
  }
}

}  // namespace
}  // namespace twilight::test
