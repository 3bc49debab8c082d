#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/host_cuda_backend.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/paged_fixture.h"
#include "support/prune_promises.h"
#include "support/random.h"
#include "support/step_buffers.h"

/// Attention of the GPU against the scalar reference; values are about N(0, 1). f32 sums over D
/// channels and N tokens, exponentials to 2^-22 of themselves; a score's error is a share of
/// |q| |k|, which kWide makes large.
namespace twilight::test {
namespace {

Tolerance tolerance_of(const OpCase& op_case) {
  const bool wide = op_case.options.distribution == Distribution::kWide;
  return {.abs = wide ? 2e-3 : 5e-5, .rel = wide ? 2e-3 : 5e-5, .cosine = 1e-6};
}

std::vector<OpCase> attend_cases() {
  std::vector<OpCase> cases = without_labels(all_cases());
  const auto add = [&](const char* name, std::vector<std::int32_t> lengths, std::int32_t q_heads,
                       std::int32_t kv_heads, std::int32_t dim, std::int32_t page_size,
                       DType dtype) {
    OpCase c;
    c.name = name;
    c.shape = {.lengths = std::move(lengths),
               .num_q_heads = q_heads,
               .num_kv_heads = kv_heads,
               .head_dim = dim,
               .page_size = page_size,
               .dtype = dtype,
               .format = {}};
    c.policy.mode = SelectMode::kAll;
    c.policy.criterion = PruneCriterion::kNone;
    cases.push_back(c);
  };
  add("splits_group3_dim80", {2600, 0, 33, 700, 511, 512, 513}, 15, 5, 80, 16, DType::kBf16);
  add("splits_group16_dim96", {2049, 257}, 32, 2, 96, 16, DType::kBf16);
  add("splits_group8_dim256", {2100}, 16, 2, 256, 32, DType::kBf16);
  add("splits_group1_dim64", {2304, 2047}, 17, 17, 64, 16, DType::kBf16);
  add("splits_group4_dim128", {17000}, 4, 1, 128, 16, DType::kBf16);
  add("splits_group8_dim128", {3000, 0, 1, 255, 256, 257}, 16, 2, 128, 32, DType::kBf16);
  add("splits_group4_dim64_f16", {5000, 4096, 4097, 15}, 8, 2, 64, 16, DType::kF16);
  add("splits_group2_dim8_page7", {2200, 300}, 6, 3, 8, 7, DType::kF16);
  add("splits_group5_dim192", {1400, 31, 32, 1}, 10, 2, 192, 16, DType::kF32);
  return cases;
}

class AttendCuda : public ::testing::TestWithParam<OpCase> {
 protected:
  OpCase case_ = GetParam();
  PagedFixture fixture_ = case_.make_fixture();
  std::unique_ptr<Backend> ref_ = make_ref_backend();
  StepBuffers expected_{case_, fixture_};
};

TEST_P(AttendCuda, DenseMatchesReference) {
  StepBuffers actual(case_, fixture_);
  TestWorkspace none(*ref_, expected_.caps());
  ref_->attend_dense(expected_.attend_dense_params(), none.get());
  TestWorkspace workspace(gpu(), actual.caps());
  gpu().attend_dense(actual.attend_dense_params(), workspace.get());
  EXPECT_TRUE(close(actual.out, expected_.out, tolerance_of(case_)));
  StepBuffers again(case_, fixture_);
  gpu().attend_dense(again.attend_dense_params(), workspace.get());
  EXPECT_EQ(0, std::memcmp(again.out.data(), actual.out.data(), again.out.size() * sizeof(float)));
}

TEST_P(AttendCuda, SparseMatchesReference) {
  TestWorkspace none(*ref_, expected_.caps());
  expected_.run_selection(*ref_, none.get());
  ref_->attend_sparse(expected_.attend_sparse_params(), none.get());
  StepBuffers actual(case_, fixture_);
  actual.scores = expected_.scores;
  actual.log_masses = expected_.log_masses;
  actual.pages = expected_.pages;
  actual.page_counts = expected_.page_counts;
  actual.kept = expected_.kept;
  actual.kept_counts = expected_.kept_counts;
  actual.tail_mass = expected_.tail_mass;
  actual.tail_shift = expected_.tail_shift;
  TestWorkspace workspace(gpu(), actual.caps());
  gpu().attend_sparse(actual.attend_sparse_params(), workspace.get());
  EXPECT_TRUE(close(actual.out, expected_.out, tolerance_of(case_)));
}

// Ragged lists: none, one, odd lengths, runs and gaps; what lies behind the counts is garbage.
TEST_P(AttendCuda, RaggedLists) {
  Random random(5);
  for (std::int64_t seq = 0; seq < fixture_.num_seqs(); ++seq) {
    const std::int32_t length = case_.shape.lengths[static_cast<std::size_t>(seq)];
    for (std::int64_t head = 0; head < case_.shape.num_kv_heads; ++head) {
      const std::int64_t row = expected_.row(seq, head);
      std::int32_t* const kept = expected_.kept.data() + row * expected_.kept_stride;
      const float density = random.below(4) == 0 ? 0.0F : random.uniform();
      std::int32_t count = 0;
      for (std::int32_t t = 0; t < length && count < expected_.kept_stride; ++t) {
        if (random.uniform() < density) kept[count++] = t;
      }
      expected_.kept_counts[static_cast<std::size_t>(row)] = count;
    }
  }
  StepBuffers actual(case_, fixture_);
  actual.kept = expected_.kept;
  actual.kept_counts = expected_.kept_counts;
  const auto run = [](Backend& backend, StepBuffers& step) {
    TestWorkspace workspace(backend, step.caps());
    AttendSparseParams params = step.attend_sparse_params();
    params.tail = {};
    backend.attend_sparse(params, workspace.get());
  };
  run(*ref_, expected_);
  run(gpu(), actual);
  EXPECT_TRUE(close(actual.out, expected_.out, tolerance_of(case_)));
}

// The whole step on the GPU, judged by its own kept lists.
TEST_P(AttendCuda, WholeStep) {
  StepBuffers step(case_, fixture_);
  TestWorkspace workspace(gpu(), step.caps());
  gpu().sparse_step(step.sparse_step_params(), workspace.get());
  check_attention(case_, fixture_, step, tolerance_of(case_));
  // The same bits where nobody reads the lists.
  StepBuffers silent(case_, fixture_);
  SparseStepParams params = silent.sparse_step_params();
  params.wants_lists = false;
  gpu().sparse_step(params, workspace.get());
  EXPECT_EQ(0, std::memcmp(silent.out.data(), step.out.data(), step.out.size() * sizeof(float)));
}

INSTANTIATE_TEST_SUITE_P(Cases, AttendCuda, ::testing::ValuesIn(attend_cases()), CaseName());

struct PrefillCase {
  std::int32_t tokens, before, q_heads, kv_heads, dim, page_size;
  DType dtype;
};

class PrefillCuda : public ::testing::TestWithParam<PrefillCase> {};

TEST_P(PrefillCuda, MatchesReference) {
  const PrefillCase& c = GetParam();
  FixtureShape shape{.lengths = {c.before + c.tokens},
                     .num_q_heads = c.q_heads,
                     .num_kv_heads = c.kv_heads,
                     .head_dim = c.dim,
                     .page_size = c.page_size,
                     .dtype = c.dtype,
                     .format = {.summary = SummaryKind::kNone, .key_bits = 0}};
  const PagedFixture fixture(shape, {.distribution = Distribution::kPlanted});
  const std::int64_t row = std::int64_t{c.q_heads} * c.dim;
  const std::int64_t stride = row + 3;
  Random random(9);
  std::vector<float> q(static_cast<std::size_t>(c.tokens * stride),
                       std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    for (std::int64_t i = 0; i < row; ++i)
      q[static_cast<std::size_t>(t * stride + i)] = random.normal();
  }
  const auto run = [&](Backend& backend, bool full_precision) {
    std::vector<float> out(q.size(), 42.0F);
    AttendPrefillParams params;
    params.full_precision = full_precision;
    params.q = q.data();
    params.q_token_stride = stride;
    params.num_q_heads = c.q_heads;
    params.num_tokens = c.tokens;
    params.kv = fixture.kv();
    params.scale = fixture.scale();
    params.out = out.data();
    params.out_token_stride = stride;
    backend.attend_prefill(params);
    return out;
  };
  const std::vector<float> want = run(*make_ref_backend(), true);
  EXPECT_TRUE(close(run(gpu(), true), want, {.abs = 5e-5, .rel = 5e-5}));
  // Queries and weights rounded to the cache's dtype.
  const float rounding = c.dtype == DType::kF32 ? 5e-5F : c.dtype == DType::kF16 ? 8e-3F : 5e-2F;
  EXPECT_TRUE(close(run(gpu(), false), want, {.abs = rounding, .rel = rounding, .cosine = 1e-3}));
}

INSTANTIATE_TEST_SUITE_P(All, PrefillCuda,
                         ::testing::Values(PrefillCase{1, 0, 4, 2, 64, 16, DType::kBf16},
                                           PrefillCase{33, 100, 4, 1, 128, 16, DType::kBf16},
                                           PrefillCase{70, 0, 3, 3, 80, 16, DType::kF16},
                                           PrefillCase{65, 31, 8, 2, 96, 7, DType::kF32},
                                           PrefillCase{40, 64, 4, 2, 256, 64, DType::kBf16},
                                           PrefillCase{5, 500, 2, 1, 8, 16, DType::kBf16},
                                           PrefillCase{300, 177, 8, 2, 128, 16, DType::kBf16},
                                           PrefillCase{129, 0, 4, 4, 64, 32, DType::kF16},
                                           PrefillCase{64, 63, 2, 1, 128, 7, DType::kF16},
                                           PrefillCase{200, 1000, 8, 2, 128, 16, DType::kF16},
                                           PrefillCase{1, 700, 4, 1, 128, 32, DType::kBf16},
                                           PrefillCase{257, 255, 4, 1, 64, 16, DType::kBf16},
                                           PrefillCase{140, 393, 5, 1, 64, 1, DType::kF16}));

// The same bits however a prompt is cut, so that a prefix cache changes nothing.
TEST(PrefillCudaSpecial, RowsDoNotDependOnTheRun) {
  for (const std::int32_t page_size : {16, 24}) {
    SCOPED_TRACE(page_size);
    constexpr std::int32_t kTokens = 531;
    constexpr std::int32_t kHeads = 8;
    constexpr std::int64_t kRow = std::int64_t{kHeads} * 128;
    Random random(4);
    std::vector<float> q(kTokens * kRow);
    for (float& x : q) x = random.normal();
    const auto run = [&](std::int32_t first, std::int32_t end) {
      FixtureShape shape{.lengths = {kTokens},
                         .num_q_heads = kHeads,
                         .num_kv_heads = 2,
                         .head_dim = 128,
                         .page_size = page_size,
                         .dtype = DType::kBf16,
                         .format = {.summary = SummaryKind::kNone, .key_bits = 0}};
      PagedFixture fixture(shape, {.distribution = Distribution::kPlanted});
      AttendPrefillParams params;
      params.q = q.data() + first * kRow;
      params.q_token_stride = kRow;
      params.num_q_heads = kHeads;
      params.num_tokens = end - first;
      params.kv = fixture.kv();
      const std::int32_t length = end;
      params.kv.seq_lens = &length;
      params.kv.host_seq_lens = &length;
      params.scale = fixture.scale();
      std::vector<float> out(static_cast<std::size_t>((end - first) * kRow));
      params.out = out.data();
      params.out_token_stride = kRow;
      gpu().attend_prefill(params);
      return out;
    };
    const std::vector<float> whole = run(0, kTokens);
    for (const auto& [first, end] : {std::pair{0, 100}, {100, 388}, {388, 389}, {389, kTokens}}) {
      const std::vector<float> part = run(first, end);
      EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + first * kRow)) << first;
    }
  }
}

// NaN in a key reaches its group alone; in a value its channel alone.
TEST(AttendCudaSpecial, NanStaysWhereItBelongs) {
  OpCase c;
  c.name = "special";
  c.shape = {.lengths = {100},
             .num_q_heads = 8,
             .num_kv_heads = 2,
             .head_dim = 64,
             .page_size = 16,
             .dtype = DType::kBf16,
             .format = {}};
  PagedFixture fixture = c.make_fixture();
  const auto run = [&] {
    StepBuffers step(c, fixture);
    TestWorkspace workspace(gpu(), step.caps());
    gpu().attend_dense(step.attend_dense_params(), workspace.get());
    return step.out;
  };
  const std::vector<float> clean = run();
  std::vector<float> value = fixture.v_row(0, 99, 0);
  value[37] = std::numeric_limits<float>::quiet_NaN();
  fixture.set_v(0, 99, 0, value);
  std::vector<float> key = fixture.k_row(0, 57, 1);
  key[9] = std::numeric_limits<float>::quiet_NaN();
  fixture.set_k(0, 57, 1, key);
  const std::vector<float> out = run();
  for (std::size_t i = 0; i < 8 * 64; ++i) {
    if (i >= 4 * 64 || i % 64 == 37) {
      EXPECT_TRUE(std::isnan(out[i])) << i;
    } else {
      EXPECT_EQ(out[i], clean[i]) << i;
    }
  }
}

}  // namespace
}  // namespace twilight::test
