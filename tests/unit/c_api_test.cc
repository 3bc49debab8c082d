#include "twilight/c.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "support/c_abi_case.h"

namespace twilight::test {
namespace {

class CApi : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    twl_context_options options{};
    options.struct_size = sizeof options;
    options.device = GetParam();
    options.threads = 2;
    ASSERT_EQ(twl_context_create(&options, &context_), TWL_OK) << twl_last_error();
  }
  void TearDown() override { twl_context_destroy(context_); }

  // Appends, seals and decodes the whole case; the statistics of its sequences.
  std::vector<twl_seq_stats> run(CAbiCase& c) {
    std::vector<twl_seq_stats> stats(c.shape.lengths.size());
    if (!stats.empty()) stats[0].struct_size = sizeof stats[0];
    EXPECT_EQ(twl_append(context_, &c.append), TWL_OK) << twl_last_error();
    EXPECT_EQ(twl_seal(context_, &c.seal), TWL_OK) << twl_last_error();
    twl_plan* plan = nullptr;
    EXPECT_EQ(twl_plan_create(context_, &c.policy, &c.plan_shape, &plan), TWL_OK)
        << twl_last_error();
    const std::size_t bytes = twl_plan_workspace_bytes(plan);
    const auto workspace = aligned_memory(bytes);
    EXPECT_EQ(twl_decode(plan, &c.decode, workspace.get(), bytes, stats.data()), TWL_OK)
        << twl_last_error();
    twl_plan_destroy(plan);
    return stats;
  }

  static double worst_error(const CAbiCase& c) {
    double worst = 0;
    std::vector<double> expected(static_cast<std::size_t>(c.shape.head_dim));
    for (std::int32_t seq = 0; seq < c.kv.num_seqs; ++seq) {
      for (std::int32_t head = 0; head < c.plan_shape.num_q_heads; ++head) {
        const std::int64_t at = seq * c.q_row() + std::int64_t{head} * c.shape.head_dim;
        c.plain_attention(seq, c.seq_lens[static_cast<std::size_t>(seq)], head,
                          c.queries.data() + at, expected.data());
        for (std::size_t d = 0; d < expected.size(); ++d) {
          const auto got = static_cast<double>(c.out[static_cast<std::size_t>(at) + d]);
          worst = std::fmax(worst, std::isnan(got) ? INFINITY : std::abs(got - expected[d]));
        }
      }
    }
    return worst;
  }

  twl_context* context_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(Devices, CApi, ::testing::Values("cpu", "ref"));

CAbiShape usual_shape() {
  CAbiShape shape;
  shape.num_kv_heads = 2;
  shape.group = 2;
  shape.head_dim = 32;
  shape.page_size = 8;
  shape.lengths = {300, 0, 8, 511};
  return shape;
}

TEST_P(CApi, DenseMatchesPlainAttentionWhateverTheLayout) {
  for (const std::int32_t dtype : {TWL_F32, TWL_F16, TWL_BF16}) {
    for (const bool token_major : {false, true}) {
      CAbiShape shape = usual_shape();
      shape.dtype = dtype;
      shape.token_major = token_major;
      shape.row_padding = token_major ? 8 : 0;
      shape.preset = "dense";
      CAbiCase c(shape);
      for (const auto& s : run(c)) {
        EXPECT_EQ(s.path, TWL_PATH_DENSE_POLICY);
        EXPECT_EQ(s.bytes_read, s.bytes_dense);
      }
      // Keys and values are exact in every dtype; bf16 products round queries and weights, 8 bits.
      EXPECT_LT(worst_error(c), dtype == TWL_BF16 ? 0.03 : 1e-4) << dtype << token_major;
    }
  }
}

TEST_P(CApi, PaperPolicyReadsLessAndStaysWithinTheMassItKeeps) {
  CAbiCase c(usual_shape());
  c.policy.candidate_fraction = 1;
  c.policy.max_candidates = 1 << 20;
  c.p.assign(c.p.size(), 0.95F);
  for (float& q : c.queries) q *= 4;  // a few tokens hold most of the weight
  const auto stats = run(c);
  EXPECT_EQ(stats[0].path, TWL_PATH_SPARSE);
  EXPECT_EQ(stats[1].path, TWL_PATH_DENSE_SHORT);
  EXPECT_EQ(stats[2].path, TWL_PATH_DENSE_ALL_FORCED);
  EXPECT_EQ(stats[3].path, TWL_PATH_SPARSE);
  EXPECT_EQ(stats[3].num_tokens, 511);
  EXPECT_EQ(stats[3].candidates_mean, 511);
  EXPECT_LT(stats[3].attended_mean, 511);
  EXPECT_LE(stats[3].kept_mean, stats[3].attended_mean);
  EXPECT_GE(stats[3].estimated_mass_mean, 0.95 - 1e-3);
  EXPECT_LT(stats[3].bytes_read, stats[3].bytes_dense);
  // Leaving out a share 1 - m of the weight moves an output by at most 2 (1 - m) max |v|; 4-bit
  // estimates cost some more.
  EXPECT_LT(worst_error(c), 2 * 0.05 * static_cast<double>(CAbiCase::kMaxValue) * 1.5);
  EXPECT_GT(worst_error(c), 0);
}

// The tail adds what the estimates dropped by its mean: closer than without it, on fewer bytes than
// the keys and values.
TEST_P(CApi, AdaptivePolicyKeepsThePromisesAndCountsTheTail) {
  double errors[2] = {};
  for (const std::int32_t tail : {0, 1}) {
    CAbiShape shape = usual_shape();
    shape.preset = tail == 1 ? "adaptive" : "paper";
    CAbiCase c(shape);
    if (tail == 1) {
      EXPECT_EQ(c.policy.selector, TWL_SELECTOR_SUB_CENTROID);
      EXPECT_EQ(c.policy.criterion, TWL_CRITERION_GROUP_MEAN);
      EXPECT_EQ(c.policy.tail, 1);
      EXPECT_EQ(c.index.value_bits, 4);
      EXPECT_NE(c.index.value_means, nullptr);
      EXPECT_NE(c.index.params, nullptr);
    }
    c.policy.candidate_fraction = 1;
    c.policy.max_candidates = 1 << 20;
    c.p.assign(c.p.size(), 0.5F);
    const auto stats = run(c);
    EXPECT_EQ(stats[0].path, TWL_PATH_SPARSE);
    EXPECT_EQ(stats[1].path, TWL_PATH_DENSE_SHORT);
    EXPECT_EQ(stats[3].candidates_mean, 511);
    EXPECT_LT(stats[3].attended_mean, 511);
    EXPECT_LT(stats[3].bytes_read, stats[3].bytes_dense);
    errors[tail] = worst_error(c);
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_GT(errors[1], 0);
}

TEST_P(CApi, FarTailCountsPagesOutsideTheCandidates) {
  double errors[2] = {};
  std::int64_t bytes[2] = {};
  for (const std::int32_t far : {0, 1}) {
    CAbiShape shape = usual_shape();
    shape.preset = "adaptive";
    CAbiCase c(shape);
    c.policy.candidate_fraction = 0.1;
    c.policy.far_tail = far;
    c.policy.far_floor = 0;
    const auto stats = run(c);
    EXPECT_EQ(stats[3].path, TWL_PATH_SPARSE);
    errors[far] = worst_error(c);
    bytes[far] = stats[3].bytes_read;
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_GT(bytes[1], bytes[0]);
}

TEST_P(CApi, MissingPlanesAreNamed) {
  CAbiShape shape = usual_shape();
  shape.preset = "adaptive";
  CAbiCase c(shape);
  ASSERT_EQ(twl_append(context_, &c.append), TWL_OK) << twl_last_error();
  const auto fails = [&](const char* field, auto member) {
    twl_index_view index = c.index;
    index.*member = nullptr;
    twl_seal_args seal = c.seal;
    seal.index = &index;
    EXPECT_EQ(twl_seal(context_, &seal), TWL_INVALID_ARGUMENT) << field;
    EXPECT_NE(std::strstr(twl_last_error(), field), nullptr) << twl_last_error();
  };
  fails("index.summaries", &twl_index_view::summaries);
  fails("index.estimates", &twl_index_view::estimates);
  fails("index.value_means", &twl_index_view::value_means);
  fails("index.params", &twl_index_view::params);
  c.index.reserved = 1;
  EXPECT_EQ(twl_seal(context_, &c.seal), TWL_INVALID_ARGUMENT);
  c.index.reserved = 0;
  ASSERT_EQ(twl_seal(context_, &c.seal), TWL_OK) << twl_last_error();
  // A view of the first version lacks what the policy reads.
  twl_plan* plan = nullptr;
  ASSERT_EQ(twl_plan_create(context_, &c.policy, &c.plan_shape, &plan), TWL_OK);
  const std::size_t bytes = twl_plan_workspace_bytes(plan);
  const auto workspace = aligned_memory(bytes);
  c.index.struct_size = offsetof(twl_index_view, value_bits);
  EXPECT_EQ(twl_decode(plan, &c.decode, workspace.get(), bytes, nullptr), TWL_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(twl_last_error(), "index.value_bits"), nullptr) << twl_last_error();
  twl_plan_destroy(plan);
}

// Structs as the first version had them, byte after byte of garbage behind.
TEST_P(CApi, FirstVersionOfTheStructsStillWorks) {
  CAbiCase now(usual_shape());
  const auto stats = run(now);
  CAbiCase first(usual_shape());
  first.policy.candidate_mass = 7;
  first.policy.criterion = 77;
  first.policy.tail = 777;
  first.policy.struct_size = offsetof(twl_policy, candidate_mass);
  first.index.value_bits = 55;
  first.index.value_means = &first;
  first.index.struct_size = offsetof(twl_index_view, value_bits);
  const auto same = run(first);
  EXPECT_EQ(now.out, first.out);
  EXPECT_EQ(stats[3].bytes_read, same[3].bytes_read);
}

TEST_P(CApi, PrefillIsCausal) {
  CAbiShape shape = usual_shape();
  shape.lengths = {77};
  CAbiCase c(shape);
  ASSERT_EQ(twl_append(context_, &c.append), TWL_OK) << twl_last_error();
  constexpr std::int32_t kTokens = 20;
  std::vector<float> q, out(static_cast<std::size_t>(kTokens * c.q_row()));
  for (std::int32_t t = 0; t < kTokens; ++t) {
    for (const float value : c.queries) q.push_back(value * (1.0F - 0.05F * static_cast<float>(t)));
  }
  twl_prefill_args args{};
  args.struct_size = sizeof args;
  args.kv = &c.kv;
  args.queries = q.data();
  args.query_token_stride = args.out_token_stride = c.q_row();
  args.num_q_heads = c.plan_shape.num_q_heads;
  args.num_tokens = kTokens;
  args.out = out.data();
  args.full_precision = 1;
  ASSERT_EQ(twl_attend_prefill(context_, &args), TWL_OK) << twl_last_error();
  std::vector<double> expected(static_cast<std::size_t>(shape.head_dim));
  for (std::int32_t t = 0; t < kTokens; ++t) {
    for (std::int32_t head = 0; head < args.num_q_heads; ++head) {
      const std::int64_t at = t * c.q_row() + std::int64_t{head} * shape.head_dim;
      c.plain_attention(0, 77 - kTokens + t + 1, head, q.data() + at, expected.data());
      for (std::size_t d = 0; d < expected.size(); ++d) {
        ASSERT_NEAR(out[static_cast<std::size_t>(at) + d], expected[d], 1e-4) << t << ' ' << head;
      }
    }
  }
  args.num_tokens = 78;
  EXPECT_EQ(twl_attend_prefill(context_, &args), TWL_INVALID_ARGUMENT);
}

TEST_P(CApi, NegativeSlotsAreSkipped) {
  CAbiCase c(usual_shape());
  ASSERT_EQ(twl_append(context_, &c.append), TWL_OK) << twl_last_error();
  const auto* const pool = static_cast<const float*>(c.kv.k.data);
  const auto size = static_cast<std::size_t>(c.kv.k.page_stride * c.kv.num_pages);
  const std::vector<float> before(pool, pool + size);
  // A second time with other keys: only the tokens 2 and 3 land.
  for (float& key : c.keys) key = 9;
  for (std::size_t i = 0; i < c.slots.size(); ++i) {
    if (i != 2 && i != 3) c.slots[i] = -1 - static_cast<std::int64_t>(i);
  }
  ASSERT_EQ(twl_append(context_, &c.append), TWL_OK) << twl_last_error();
  std::size_t changed = 0;
  for (std::size_t i = 0; i < size; ++i) changed += pool[i] != before[i] ? 1 : 0;
  EXPECT_EQ(changed, std::size_t{2} * 2 * 32);
}

// Every pointer, set to null in turn, is named in the text.
TEST_P(CApi, NullArgumentsAreNamed) {
  CAbiCase c(usual_shape());
  run(c);
  twl_plan* plan = nullptr;
  ASSERT_EQ(twl_plan_create(context_, &c.policy, &c.plan_shape, &plan), TWL_OK);
  const std::size_t bytes = twl_plan_workspace_bytes(plan);
  const auto workspace = aligned_memory(bytes);
  const auto named = [](twl_status status, const std::string& name) {
    EXPECT_EQ(status, TWL_INVALID_ARGUMENT) << name;
    EXPECT_NE(std::string(twl_last_error()).find(name + ", got"), std::string::npos)
        << name << " in " << twl_last_error();
  };
  const auto without = [](auto args, auto member, auto call) {
    args.*member = nullptr;
    return call(args);
  };
  const auto append = [&](const twl_append_args& args) { return twl_append(context_, &args); };
  const auto seal = [&](const twl_seal_args& args) { return twl_seal(context_, &args); };
  const auto decode = [&](const twl_decode_args& args) {
    return twl_decode(plan, &args, workspace.get(), bytes, nullptr);
  };
  named(twl_append(nullptr, &c.append), "context");
  named(twl_append(context_, nullptr), "args");
  named(without(c.append, &twl_append_args::kv, append), "kv");
  named(without(c.append, &twl_append_args::keys, append), "keys");
  named(without(c.append, &twl_append_args::values, append), "values");
  named(without(c.append, &twl_append_args::slots, append), "slots");
  named(twl_seal(nullptr, &c.seal), "context");
  named(without(c.seal, &twl_seal_args::kv, seal), "kv");
  named(without(c.seal, &twl_seal_args::index, seal), "index");
  named(without(c.seal, &twl_seal_args::pages, seal), "pages");
  named(twl_decode(nullptr, &c.decode, workspace.get(), bytes, nullptr), "plan");
  named(twl_decode(plan, nullptr, workspace.get(), bytes, nullptr), "args");
  named(without(c.decode, &twl_decode_args::kv, decode), "kv");
  named(without(c.decode, &twl_decode_args::index, decode), "index");
  named(without(c.decode, &twl_decode_args::queries, decode), "queries");
  named(without(c.decode, &twl_decode_args::out, decode), "out");
  named(twl_decode(plan, &c.decode, nullptr, bytes, nullptr), "workspace");
  twl_plan_destroy(plan);
  named(twl_plan_create(context_, nullptr, &c.plan_shape, &plan), "policy");
  EXPECT_EQ(plan, nullptr);
  named(twl_plan_create(context_, &c.policy, nullptr, &plan), "shape");
  named(twl_plan_create(context_, &c.policy, &c.plan_shape, nullptr), "plan");
  named(twl_context_create(nullptr, nullptr), "context");
  named(twl_policy_init(nullptr, &c.policy), "preset");
  named(twl_policy_init("paper", nullptr), "policy");
  std::size_t size = 0;
  named(twl_index_sizes(&c.policy, 16, 64, nullptr, &size), "summary_bytes");
  named(twl_index_sizes(&c.policy, 16, 64, &size, nullptr), "estimate_bytes");
}

TEST(CStructs, SizeTellsTheVersion) {
  // A caller of a later version: two more words, which must be zero to be ignored.
  struct {
    twl_policy policy;
    std::uint64_t added[2];
  } later{};
  later.policy.struct_size = sizeof later;
  later.added[1] = 42;
  ASSERT_EQ(twl_policy_init("paper", &later.policy), TWL_OK) << twl_last_error();
  EXPECT_EQ(later.policy.struct_size, sizeof later);
  EXPECT_EQ(later.added[1], 42U) << "init wrote past what it knows";
  std::size_t summary = 0, estimate = 0;
  EXPECT_EQ(twl_index_sizes(&later.policy, 16, 128, &summary, &estimate), TWL_UNSUPPORTED);
  later.added[1] = 0;
  ASSERT_EQ(twl_index_sizes(&later.policy, 16, 128, &summary, &estimate), TWL_OK);
  EXPECT_EQ(summary, 512U);
  EXPECT_EQ(estimate, 1088U);
  later.policy.struct_size = offsetof(twl_policy, candidate_mass) - 8;
  EXPECT_EQ(twl_index_sizes(&later.policy, 16, 128, &summary, &estimate), TWL_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(twl_last_error(), "policy.struct_size, got"), nullptr);
}

TEST(CStructs, WhatTheFirstVersionCannotSay) {
  static_assert(offsetof(twl_policy, candidate_mass) == 80);
  static_assert(offsetof(twl_index_view, value_bits) == 64);
  twl_policy policy{};
  policy.struct_size = offsetof(twl_policy, candidate_mass);
  policy.tail = 42;
  EXPECT_EQ(twl_policy_init("adaptive", &policy), TWL_UNSUPPORTED);
  EXPECT_NE(std::strstr(twl_last_error(), "policy.struct_size, got 80"), nullptr);
  ASSERT_EQ(twl_policy_init("paper", &policy), TWL_OK);
  EXPECT_EQ(policy.tail, 42) << "init wrote past the caller's struct";

  policy.struct_size = sizeof policy;
  ASSERT_EQ(twl_policy_init("adaptive", &policy), TWL_OK);
  twl_index_view view{};
  view.struct_size = offsetof(twl_index_view, value_bits);
  EXPECT_EQ(twl_index_view_init(&policy, &view), TWL_UNSUPPORTED);
  std::size_t summary = 0, estimate = 0;
  EXPECT_EQ(twl_index_sizes(&policy, 16, 128, &summary, &estimate), TWL_UNSUPPORTED);
  twl_index_bytes bytes{};
  bytes.struct_size = sizeof bytes;
  ASSERT_EQ(twl_index_record_bytes(&policy, 16, 128, &bytes), TWL_OK);
  EXPECT_EQ(bytes.summary, 256U);
  EXPECT_EQ(bytes.estimate, 544U);
  EXPECT_EQ(bytes.value_mean, 64U);
  EXPECT_EQ(bytes.params, 16U);
  policy.selector = TWL_SELECTOR_FULL;
  policy.tail = 0;
  ASSERT_EQ(twl_index_record_bytes(&policy, 17, 80, &bytes), TWL_OK);
  EXPECT_EQ(bytes.summary, 0U);
  EXPECT_EQ(bytes.estimate, 2 * (320U + 32U) + 48U);  // 40 bytes of its own mean, padded
  EXPECT_EQ(bytes.value_mean, 0U);
  EXPECT_EQ(bytes.params, 16U);
  policy.criterion = 2;
  EXPECT_EQ(twl_index_record_bytes(&policy, 16, 128, &bytes), TWL_INVALID_ARGUMENT);
  EXPECT_NE(std::strstr(twl_last_error(), "policy.criterion, got 2"), nullptr);
  policy.criterion = TWL_CRITERION_PER_HEAD;
  policy.selector = TWL_SELECTOR_HALF_CENTROID + 1;
  EXPECT_EQ(twl_index_record_bytes(&policy, 16, 128, &bytes), TWL_INVALID_ARGUMENT);
  policy.selector = TWL_SELECTOR_QUEST;
  policy.candidate_mass = 0.5;
  EXPECT_EQ(twl_index_record_bytes(&policy, 16, 128, &bytes), TWL_INVALID_ARGUMENT);
  EXPECT_EQ(twl_index_record_bytes(&policy, 16, 128, nullptr), TWL_INVALID_ARGUMENT);
}

TEST(CStructs, StatusesHaveNames) {
  EXPECT_STREQ(twl_status_name(TWL_OK), "ok");
  EXPECT_STREQ(twl_status_name(static_cast<twl_status>(99)), "unknown status");
  twl_context* context = nullptr;
  twl_context_options options{};
  options.struct_size = sizeof options;
  options.device = "tpu";
  EXPECT_EQ(twl_context_create(&options, &context), TWL_INVALID_ARGUMENT);
  EXPECT_EQ(context, nullptr);
  EXPECT_NE(std::strstr(twl_last_error(), "tpu"), nullptr);
  twl_context_destroy(nullptr);
  twl_plan_destroy(nullptr);
  EXPECT_EQ(twl_plan_workspace_bytes(nullptr), 0U);
}

}  // namespace
}  // namespace twilight::test
