// Every field of every parameter block: a good block passes, one bad value gives an error that
// names the op and the field.
#include "ops/validate.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "ops/backend.h"
#include "support/bad_values.h"
#include "support/cases.h"
#include "support/expect_error.h"
#include "support/step_buffers.h"

namespace twilight::test {
namespace {

class Validate : public ::testing::Test {
 protected:
  Validate() : fixture_(case_.make_fixture()), step_(case_, fixture_) {}

  static OpCase make_case() {
    OpCase c = correctness_cases()[0];
    c.shape.lengths = {130, 40};
    c.shape.head_dim = 64;
    return c;
  }
  OpCase case_ = make_case();
  PagedFixture fixture_;
  StepBuffers step_;
  std::vector<float> floats_ = std::vector<float>(4096);
  std::vector<std::int32_t> ints_ = std::vector<std::int32_t>(16);
  std::vector<std::int64_t> slots_ = std::vector<std::int64_t>(16);
};

TEST_F(Validate, CacheOps) {
  using Append = AppendKvParams;
  expect_each_rejected<Append>(
      "append_kv",
      {.kv = fixture_.kv(),
       .k = floats_.data(),
       .v = floats_.data(),
       .k_token_stride = 128,
       .v_token_stride = 128,
       .slots = slots_.data(),
       .num_tokens = 2},
      join<Append>({shape_bads<Append>(),
                    k_bads<Append>(),
                    v_bads<Append>(),
                    {{"num_tokens", [](Append& p) { p.num_tokens = -1; }},
                     {"k, got null", [](Append& p) { p.k = nullptr; }},
                     {"v, got null", [](Append& p) { p.v = nullptr; }},
                     {"slots", [](Append& p) { p.slots = nullptr; }},
                     {"k_token_stride", [](Append& p) { p.k_token_stride = 127; }},
                     {"v_token_stride", [](Append& p) { p.v_token_stride = 0; }}}}));
  using Seal = SealPagesParams;
  expect_each_rejected<Seal>(
      "seal_pages",
      {.kv = fixture_.kv(), .index = fixture_.index(), .pages = ints_.data(), .num_pages = 1},
      join<Seal>({shape_bads<Seal>(),
                  k_bads<Seal>(),
                  summary_bads<Seal>(),
                  estimate_bads<Seal>(),
                  {{"num_pages", [](Seal& p) { p.num_pages = -1; }},
                   {"pages", [](Seal& p) { p.pages = nullptr; }},
                   {"index.format.summary",
                    [](Seal& p) { p.index.format.summary = static_cast<SummaryKind>(9); }}}}));
  using Copy = CopyPagesParams;
  expect_each_rejected<Copy>("copy_pages",
                             {.kv = fixture_.kv(),
                              .index = fixture_.index(),
                              .from = ints_.data(),
                              .to = ints_.data(),
                              .num_pages = 1},
                             join<Copy>({shape_bads<Copy>(),
                                         k_bads<Copy>(),
                                         v_bads<Copy>(),
                                         summary_bads<Copy>(),
                                         estimate_bads<Copy>(),
                                         {{"num_pages", [](Copy& p) { p.num_pages = -1; }},
                                          {"from", [](Copy& p) { p.from = nullptr; }},
                                          {"to", [](Copy& p) { p.to = nullptr; }}}}));
}

TEST_F(Validate, ScoreOps) {
  using Score = ScorePagesParams;
  expect_each_rejected<Score>(
      "score_pages", step_.score_params(),
      join<Score>(
          {shape_bads<Score>(),
           subset_bads<Score>(),
           query_bads<Score>(),
           summary_bads<Score>(),
           {{"index.format.summary", [](Score& p) { p.index.format.summary = SummaryKind::kNone; }},
            {"scores", [](Score& p) { p.scores = nullptr; }},
            {"page_stride", [](Score& p) { p.page_stride = 7; }}}}));
  using Exact = ExactScoresParams;
  expect_each_rejected<Exact>(
      "exact_scores", step_.exact_scores_params(),
      join<Exact>({shape_bads<Exact>(),
                   subset_bads<Exact>(),
                   query_bads<Exact>(),
                   k_bads<Exact>(),
                   {{"scores", [](Exact& p) { p.scores = nullptr; }},
                    {"token_stride", [](Exact& p) { p.token_stride = 129; }}}}));
  using Estimate = EstimateParams;
  const Estimate estimate = step_.estimate_params();
  expect_each_rejected<Estimate>(
      "estimate_scores", estimate,
      join<Estimate>({shape_bads<Estimate>(),
                      subset_bads<Estimate>(),
                      query_bads<Estimate>(),
                      k_bads<Estimate>(),
                      estimate_bads<Estimate>(),
                      {{"index.format.key_bits", [](Estimate& p) { p.index.format.key_bits = 0; }},
                       {"pages", [](Estimate& p) { p.pages = nullptr; }},
                       {"page_counts", [](Estimate& p) { p.page_counts = nullptr; }},
                       {"candidate_stride", [](Estimate& p) { p.candidate_stride = -1; }},
                       {"estimates", [](Estimate& p) { p.estimates = nullptr; }},
                       {"estimate_stride", [](Estimate& p) { p.estimate_stride = 16; }},
                       {"estimate_stride", [](Estimate& p) { p.estimate_stride += 1; }}}}));
  Estimate exact = estimate;
  exact.exact_keys = true;
  exact.index = {};
  EXPECT_NO_THROW(validate(exact));
}

TEST_F(Validate, SelectAndPrune) {
  using Select = SelectPagesParams;
  const Select select = step_.select_params();
  expect_each_rejected<Select>(
      "select_pages", select,
      join<Select>({shape_bads<Select>(),
                    subset_bads<Select>(),
                    {{"mode", [](Select& p) { p.mode = static_cast<SelectMode>(3); }},
                     {"forced.sink_tokens", [](Select& p) { p.forced.sink_tokens = -1; }},
                     {"forced.recent_pages", [](Select& p) { p.forced.recent_pages = -1; }},
                     {"fraction", [](Select& p) { p.fraction = 1.5; }},
                     {"fraction", [](Select& p) { p.fraction = -0.1; }},
                     {"fraction", [](Select& p) { p.fraction = kNan; }},
                     {"min_tokens", [](Select& p) { p.min_tokens = -1; }},
                     {"max_tokens", [](Select& p) { p.max_tokens = p.min_tokens - 1; }},
                     {"scores", [](Select& p) { p.scores = nullptr; }},
                     {"page_stride", [](Select& p) { p.page_stride = 7; }},
                     {"pages", [](Select& p) { p.pages = nullptr; }},
                     {"page_counts", [](Select& p) { p.page_counts = nullptr; }},
                     {"candidate_stride", [](Select& p) { p.candidate_stride = 1; }}}}));
  // The capacity that just suffices: 9 pages in all, of which the budget takes 8.
  Select tight = select;
  tight.fraction = 0;
  tight.min_tokens = tight.max_tokens = 128;
  tight.candidate_stride = 8;
  EXPECT_NO_THROW(validate(tight));
  tight.candidate_stride = 7;
  EXPECT_THROW(validate(tight), Error);
  tight.mode = SelectMode::kAll;
  tight.candidate_stride = 9;
  EXPECT_NO_THROW(validate(tight));
  tight.candidate_stride = 8;
  EXPECT_THROW(validate(tight), Error);

  using Prune = PruneParams;
  const Prune prune = step_.prune_params();
  for (const float bad_p : {0.0F, -0.5F, 1.0001F, kNan}) {
    std::vector<float> p = step_.p;
    p.back() = bad_p;
    expect_each_rejected<Prune>("prune_top_p", prune,
                                {{"p, got", [&](Prune& params) { params.p = p.data(); }}});
  }
  expect_each_rejected<Prune>(
      "prune_top_p", prune,
      join<Prune>({shape_bads<Prune>(),
                   subset_bads<Prune>(),
                   {{"num_q_heads", [](Prune& p) { p.num_q_heads = 3; }},
                    {"criterion", [](Prune& p) { p.criterion = static_cast<PruneCriterion>(3); }},
                    {"forced.sink_tokens", [](Prune& p) { p.forced.sink_tokens = -1; }},
                    {"forced.recent_pages", [](Prune& p) { p.forced.recent_pages = -1; }},
                    {"min_tokens", [](Prune& p) { p.min_tokens = -1; }},
                    {"p, got null", [](Prune& p) { p.p = nullptr; }},
                    {"pages", [](Prune& p) { p.pages = nullptr; }},
                    {"page_counts", [](Prune& p) { p.page_counts = nullptr; }},
                    {"candidate_stride", [](Prune& p) { p.candidate_stride = -1; }},
                    {"estimates", [](Prune& p) { p.estimates = nullptr; }},
                    {"estimate_stride", [](Prune& p) { p.estimate_stride = 0; }},
                    {"kept, got null", [](Prune& p) { p.kept = nullptr; }},
                    {"kept_counts", [](Prune& p) { p.kept_counts = nullptr; }},
                    {"kept_stride", [](Prune& p) { p.kept_stride = 5; }},
                    {"head_counts", [](Prune& p) { p.head_counts = nullptr; }},
                    {"head_mass", [](Prune& p) { p.head_mass = nullptr; }}}}));
  Prune none = prune;
  none.criterion = PruneCriterion::kNone;
  none.estimates = nullptr;
  none.p = nullptr;
  EXPECT_NO_THROW(validate(none));
}

// The planes, lists and numbers that only rotated formats and tails have.
TEST(ValidateAdaptive, NamesTheField) {
  OpCase c = correctness_cases()[0];
  c.shape.lengths = {130, 40};
  c.shape.head_dim = 64;
  c.shape.format = {.summary = SummaryKind::kCentroid, .key_bits = 2, .value_bits = 4};
  c.policy.tail = c.policy.far_tail = true;
  c.policy.mass = 0.5;
  const PagedFixture fixture = c.make_fixture();
  StepBuffers step(c, fixture);

  const auto params_bads = [](auto example) {
    using Params = decltype(example);
    return std::vector<Bad<Params>>{
        {"index.params", [](Params& p) { p.index.params = nullptr; }},
        {"index.params", [](Params& p) { p.index.params += 8; }},
        {"index.params head stride", [](Params& p) { p.index.params_head_stride = 8; }},
        {"index.params page stride", [](Params& p) { p.index.params_page_stride += 1; }},
        {"index.format.layout",
         [](Params& p) { p.index.format.layout = static_cast<IndexLayout>(2); }},
        {"kv.head_dim", [](Params& p) { p.kv.head_dim = 60; }}};
  };
  using Seal = SealPagesParams;
  const std::vector<std::int32_t> pages(4);
  const Seal seal{
      .kv = fixture.kv(), .index = fixture.index(), .pages = pages.data(), .num_pages = 1};
  expect_each_rejected<Seal>(
      "seal_pages", seal,
      join<Seal>(
          {params_bads(seal),
           summary_bads<Seal>(),
           {{"index.value_means", [](Seal& p) { p.index.value_means = nullptr; }},
            {"index.value_means head stride", [](Seal& p) { p.index.value_head_stride = 16; }},
            {"index.format.value_bits", [](Seal& p) { p.index.format.value_bits = 8; }}}}));
  using Score = ScorePagesParams;
  expect_each_rejected<Score>("score_pages", step.score_params(),
                              join<Score>({params_bads(step.score_params()),
                                           summary_bads<Score>(),
                                           {{"page_stride", [](Score& p) { p.page_stride = 7; }},
                                            {"log_masses", [](Score& p) {
                                               p.index.format.summary = SummaryKind::kQuest4;
                                               p.index.summary_head_stride =
                                                   p.index.summary_page_stride = 512;
                                             }}}}));
  using Select = SelectPagesParams;
  expect_each_rejected<Select>("select_pages", step.select_params(),
                               {{"mass, got -0.1", [](Select& p) { p.mass = -0.1; }},
                                {"mass, got 1.5", [](Select& p) { p.mass = 1.5; }},
                                {"mass, got nan", [](Select& p) { p.mass = kNan; }},
                                {"mass_floor", [](Select& p) { p.mass_floor = -1; }}});
  using Estimate = EstimateParams;
  expect_each_rejected<Estimate>(
      "estimate_scores", step.estimate_params(),
      join<Estimate>({params_bads(step.estimate_params()), summary_bads<Estimate>()}));
  using Prune = PruneParams;
  expect_each_rejected<Prune>(
      "prune_top_p", step.prune_params(),
      {{"tail_shift", [](Prune& p) { p.tail_shift = nullptr; }},
       {"tail_mass", [](Prune& p) { p.criterion = PruneCriterion::kNone; }}});
  using Sparse = AttendSparseParams;
  expect_each_rejected<Sparse>(
      "attend_sparse", step.attend_sparse_params(),
      {{"tail.shift", [](Sparse& p) { p.tail.shift = nullptr; }},
       {"tail.pages", [](Sparse& p) { p.tail.pages = nullptr; }},
       {"tail.page_counts", [](Sparse& p) { p.tail.page_counts = nullptr; }},
       {"tail.candidate_stride", [](Sparse& p) { p.tail.candidate_stride = -1; }},
       {"value_bits", [](Sparse& p) { p.tail.index.format.value_bits = 0; }},
       {"index.value_means", [](Sparse& p) { p.tail.index.value_means = nullptr; }},
       {"index.params", [](Sparse& p) { p.tail.index.params = nullptr; }},
       {"tail.scores", [](Sparse& p) { p.tail.scores = nullptr; }},
       {"page_stride", [](Sparse& p) { p.tail.page_stride = 7; }},
       {"tail.far_floor", [](Sparse& p) { p.tail.far_floor = -1; }},
       {"tail.far_floor", [](Sparse& p) { p.tail.far_floor = kNan; }}});
}

TEST_F(Validate, FusedFormNeedsBuffersOnlyWhereTheBackendHasNone) {
  const std::unique_ptr<Backend> ref = make_ref_backend();
  SelectAndPruneParams params = step_.select_and_prune_params();
  EXPECT_NO_THROW(ref->select_and_prune(params, {}));
  SelectAndPruneParams without = params;
  without.score.scores = nullptr;
  without.select.scores = nullptr;
  EXPECT_NO_THROW(validate(without));
  expect_error(ErrorCode::kInvalidArgument, {"[select_and_prune]", "scores", "got null", "ref"},
               [&] { ref->select_and_prune(without, {}); });
  without = params;
  without.estimate.estimates = nullptr;
  without.prune.estimates = nullptr;
  EXPECT_NO_THROW(validate(without));
  expect_error(ErrorCode::kInvalidArgument, {"[select_and_prune]", "estimates", "got null", "ref"},
               [&] { ref->select_and_prune(without, {}); });
  expect_error(ErrorCode::kInvalidArgument, {"[prune_top_p]", "kept, got null"}, [&] {
    params.prune.kept = nullptr;
    ref->select_and_prune(params, {});
  });
}

TEST_F(Validate, AttentionOps) {
  using Dense = AttendDenseParams;
  expect_each_rejected<Dense>(
      "attend_dense", step_.attend_dense_params(),
      join<Dense>({shape_bads<Dense>(),
                   subset_bads<Dense>(),
                   query_bads<Dense>(),
                   k_bads<Dense>(),
                   v_bads<Dense>(),
                   {{"out", [](Dense& p) { p.out = nullptr; }},
                    {"out_seq_stride", [](Dense& p) { p.out_seq_stride = 64; }}}}));
  using Sparse = AttendSparseParams;
  expect_each_rejected<Sparse>(
      "attend_sparse", step_.attend_sparse_params(),
      join<Sparse>({shape_bads<Sparse>(),
                    subset_bads<Sparse>(),
                    query_bads<Sparse>(),
                    k_bads<Sparse>(),
                    v_bads<Sparse>(),
                    {{"kept, got null", [](Sparse& p) { p.kept = nullptr; }},
                     {"kept_counts", [](Sparse& p) { p.kept_counts = nullptr; }},
                     {"kept_stride", [](Sparse& p) { p.kept_stride = -1; }},
                     {"out", [](Sparse& p) { p.out = nullptr; }},
                     {"out_seq_stride", [](Sparse& p) { p.out_seq_stride = 64; }}}}));
  using Prefill = AttendPrefillParams;
  Prefill prefill{.q = floats_.data(),
                  .q_token_stride = 512,
                  .num_q_heads = 8,
                  .num_tokens = 2,
                  .kv = fixture_.kv(),
                  .scale = 1,
                  .out = floats_.data(),
                  .out_token_stride = 512};
  prefill.kv.num_seqs = 1;
  expect_each_rejected<Prefill>(
      "attend_prefill", prefill,
      join<Prefill>({shape_bads<Prefill>(),
                     k_bads<Prefill>(),
                     v_bads<Prefill>(),
                     {{"kv.num_seqs", [](Prefill& p) { p.kv.num_seqs = 2; }},
                      {"kv.seq_lens", [](Prefill& p) { p.num_tokens = 131; }},
                      {"kv.seq_lens", [](Prefill& p) { p.kv.seq_lens = nullptr; }},
                      {"kv.block_table", [](Prefill& p) { p.kv.block_table = nullptr; }},
                      {"num_tokens", [](Prefill& p) { p.num_tokens = -1; }},
                      {"num_q_heads", [](Prefill& p) { p.num_q_heads = 7; }},
                      {"q, got null", [](Prefill& p) { p.q = nullptr; }},
                      {"out, got null", [](Prefill& p) { p.out = nullptr; }},
                      {"scale", [](Prefill& p) { p.scale = -1; }},
                      {"q_token_stride", [](Prefill& p) { p.q_token_stride = 511; }},
                      {"out_token_stride", [](Prefill& p) { p.out_token_stride = 511; }}}}));
}

TEST_F(Validate, ModelOps) {
  const auto* bytes = reinterpret_cast<const std::byte*>(floats_.data());
  using Linear = LinearParams;
  expect_each_rejected<Linear>(
      "linear",
      {.x = floats_.data(),
       .x_stride = 8,
       .num_rows = 2,
       .weight = {.data = bytes, .dtype = DType::kF32, .rows = 4, .cols = 8},
       .y = floats_.data() + 512,
       .y_stride = 4},
      {{"x, got null", [](Linear& p) { p.x = nullptr; }},
       {"y, got null", [](Linear& p) { p.y = nullptr; }},
       {"num_rows", [](Linear& p) { p.num_rows = -1; }},
       {"weight.data", [](Linear& p) { p.weight.data = nullptr; }},
       {"weight.dtype", [](Linear& p) { p.weight.dtype = static_cast<DType>(3); }},
       {"weight.blocks", [](Linear& p) { p.weight.blocks = static_cast<WeightType>(4); }},
       {"multiples of 32 in Q4_0", [](Linear& p) { p.weight.blocks = WeightType::kQ4_0; }},
       {"multiples of 256 in Q6_K", [](Linear& p) { p.weight.blocks = WeightType::kQ6_K; }},
       {"weight.rows", [](Linear& p) { p.weight.rows = 0; }},
       {"weight.cols", [](Linear& p) { p.weight.cols = 0; }},
       {"x_stride", [](Linear& p) { p.x_stride = 7; }},
       {"y_stride", [](Linear& p) { p.y_stride = 3; }}});
  using Norm = RmsNormParams;
  expect_each_rejected<Norm>("rms_norm",
                             {.x = floats_.data(),
                              .weight = floats_.data(),
                              .y = floats_.data(),
                              .num_rows = 1,
                              .hidden = 8,
                              .eps = 1e-5F},
                             {{"x, got null", [](Norm& p) { p.x = nullptr; }},
                              {"y, got null", [](Norm& p) { p.y = nullptr; }},
                              {"weight", [](Norm& p) { p.weight = nullptr; }},
                              {"num_rows", [](Norm& p) { p.num_rows = -1; }},
                              {"hidden", [](Norm& p) { p.hidden = 0; }},
                              {"eps", [](Norm& p) { p.eps = -1; }},
                              {"eps", [](Norm& p) { p.eps = kNan; }}});
  using Rope = RopeParams;
  expect_each_rejected<Rope>("rope",
                             {.x = floats_.data(),
                              .token_stride = 128,
                              .num_tokens = 2,
                              .num_heads = 2,
                              .head_dim = 64,
                              .cos = floats_.data(),
                              .sin = floats_.data()},
                             {{"x, got null", [](Rope& p) { p.x = nullptr; }},
                              {"cos", [](Rope& p) { p.cos = nullptr; }},
                              {"sin", [](Rope& p) { p.sin = nullptr; }},
                              {"token_stride", [](Rope& p) { p.token_stride = 127; }},
                              {"num_tokens", [](Rope& p) { p.num_tokens = -1; }},
                              {"num_heads", [](Rope& p) { p.num_heads = 0; }},
                              {"head_dim", [](Rope& p) { p.head_dim = 63; }},
                              {"head_dim", [](Rope& p) { p.head_dim = 1024; }}});
  using Silu = SiluMulParams;
  expect_each_rejected<Silu>(
      "silu_mul", {.gate = floats_.data(), .up = floats_.data(), .y = floats_.data(), .count = 8},
      {{"gate", [](Silu& p) { p.gate = nullptr; }},
       {"up", [](Silu& p) { p.up = nullptr; }},
       {"y, got null", [](Silu& p) { p.y = nullptr; }},
       {"count", [](Silu& p) { p.count = -1; }}});
}

TEST_F(Validate, EmptyWorkIsFine) {
  const std::unique_ptr<Backend> ref = make_ref_backend();
  PagedKvView kv;
  kv.num_kv_heads = 1;
  kv.head_dim = 64;
  kv.page_size = 16;
  EXPECT_NO_THROW(ref->append_kv({.kv = kv}));
  EXPECT_NO_THROW(ref->seal_pages({.kv = kv}));
  EXPECT_NO_THROW(ref->copy_pages({.kv = kv}));
  EXPECT_NO_THROW(ref->score_pages({.kv = kv}, {}));
  EXPECT_NO_THROW(ref->exact_scores({.kv = kv}, {}));
  EXPECT_NO_THROW(ref->select_pages({.kv = kv}, {}));
  EXPECT_NO_THROW(ref->estimate_scores({.kv = kv}, {}));
  EXPECT_NO_THROW(ref->prune_top_p({.kv = kv, .num_q_heads = 1}, {}));
  EXPECT_NO_THROW(ref->attend_dense({.kv = kv}, {}));
  EXPECT_NO_THROW(ref->attend_sparse({.kv = kv}, {}));
  EXPECT_NO_THROW(ref->attend_prefill({.num_q_heads = 1, .kv = kv}));
}

TEST_F(Validate, WorkspaceIsAligned) {
  const std::unique_ptr<Backend> ref = make_ref_backend();
  alignas(64) std::byte memory[128];
  EXPECT_NO_THROW(
      ref->attend_dense(step_.attend_dense_params(), {.data = memory, .bytes = sizeof memory}));
  expect_error(ErrorCode::kInvalidArgument, {"[attend_dense]", "workspace"}, [&] {
    ref->attend_dense(step_.attend_dense_params(), {.data = memory + 16, .bytes = 64});
  });
  expect_error(ErrorCode::kInvalidArgument, {"[attend_dense]", "workspace"},
               [&] { ref->attend_dense(step_.attend_dense_params(), {.bytes = 64}); });
}

}  // namespace
}  // namespace twilight::test
