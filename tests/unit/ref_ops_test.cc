// Single ops of the reference backend against hand-made answers and plain formulas, and what they
// may touch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "ops/backend.h"
#include "support/cases.h"
#include "support/compare.h"
#include "support/random.h"
#include "support/step_buffers.h"

namespace twilight::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

OpCase find_case(const std::string& name) {
  for (const OpCase& c : standard_cases()) {
    if (c.name == name) return c;
  }
  ADD_FAILURE() << "no case " << name;
  return {};
}

std::vector<std::byte> snapshot(std::span<const std::byte> pool) {
  return {pool.begin(), pool.end()};
}

std::size_t bytes_changed(const std::vector<std::byte>& before, std::span<const std::byte> after) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < before.size(); ++i) count += before[i] != after[i] ? 1 : 0;
  return count;
}

class RefOps : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> ref_ = make_ref_backend();
};

TEST_F(RefOps, AppendWritesItsRowsAlone) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    OpCase c = find_case("unaligned_rows_f16");
    c.shape.dtype = dtype;
    c.shape.lengths = {20, 16, 0};
    c.options.reserve_tokens = 40;
    PagedFixture fixture = c.make_fixture();
    const std::int64_t row = std::int64_t{c.shape.num_kv_heads} * c.shape.head_dim;
    // Two tokens to sequence 0 (the second on a new page), one to each other sequence.
    const std::vector<std::pair<std::int32_t, std::int32_t>> places = {
        {0, 31}, {0, 32}, {1, 16}, {2, 0}};
    std::vector<std::int64_t> slots;
    slots.reserve(places.size());
    for (const auto& [seq, token] : places) slots.push_back(fixture.slot_of(seq, token));
    std::vector<float> k(static_cast<std::size_t>(4 * (row + 3)));
    std::vector<float> v(static_cast<std::size_t>(4 * (row + 5)));
    Random random(3);
    for (float& x : k) x = random.normal();
    for (float& x : v) x = random.normal();
    k[0] = 1e6F;  // infinity in f16
    const std::vector<std::byte> k_before = snapshot(fixture.k_pool());
    const std::vector<std::byte> v_before = snapshot(fixture.v_pool());
    ref_->append_kv({.kv = fixture.kv(),
                     .k = k.data(),
                     .v = v.data(),
                     .k_token_stride = row + 3,
                     .v_token_stride = row + 5,
                     .slots = slots.data(),
                     .num_tokens = 4});
    const auto written = static_cast<std::size_t>(4 * row * dtype_bytes(dtype));
    EXPECT_LE(bytes_changed(k_before, fixture.k_pool()), written);
    EXPECT_LE(bytes_changed(v_before, fixture.v_pool()), written);
    for (std::size_t i = 0; i < places.size(); ++i) {
      const auto [seq, token] = places[i];
      for (std::int64_t h = 0; h < c.shape.num_kv_heads; ++h) {
        const std::vector<float> got_k = fixture.k_row(seq, token, h);
        const std::vector<float> got_v = fixture.v_row(seq, token, h);
        for (std::int64_t d = 0; d < c.shape.head_dim; ++d) {
          const auto at = static_cast<std::size_t>(d);
          const std::int64_t in_row = h * c.shape.head_dim + d;
          std::byte one[4];
          store_element(
              dtype, one, 0,
              k[i * static_cast<std::size_t>(row + 3) + static_cast<std::size_t>(in_row)]);
          ASSERT_EQ(got_k[at], load_element(dtype, one, 0));
          store_element(
              dtype, one, 0,
              v[i * static_cast<std::size_t>(row + 5) + static_cast<std::size_t>(in_row)]);
          ASSERT_EQ(got_v[at], load_element(dtype, one, 0));
        }
      }
    }
    if (dtype == DType::kF16) {
      EXPECT_EQ(fixture.k_row(0, 31, 0)[0], kInf);
    }
  }
}

TEST_F(RefOps, SealMatchesTheCodecAndTouchesNothingElse) {
  for (const char* name : {"page_size_53", "page_size_16", "page_size_1", "no_prune"}) {
    PagedFixture fixture = find_case(name).make_fixture();
    const std::vector<std::byte> summaries = snapshot(fixture.summary_pool());
    const std::vector<std::byte> estimates = snapshot(fixture.estimate_pool());
    const std::vector<std::byte> keys = snapshot(fixture.k_pool());
    fixture.clear_index();
    const std::vector<std::int32_t> pages = fixture.sealed_physical_pages();
    ref_->seal_pages({.kv = fixture.kv(),
                      .index = fixture.index(),
                      .pages = pages.data(),
                      .num_pages = static_cast<std::int32_t>(pages.size())});
    EXPECT_EQ(bytes_changed(summaries, fixture.summary_pool()), 0U) << name;
    EXPECT_EQ(bytes_changed(estimates, fixture.estimate_pool()), 0U) << name;
    EXPECT_EQ(bytes_changed(keys, fixture.k_pool()), 0U) << name;
  }
}

TEST_F(RefOps, CopiedPagesCanStandInForTheirOriginals) {
  OpCase c = find_case("group_3_dim_80");
  c.policy.mixed_p = false;
  PagedFixture fixture = c.make_fixture();
  StepBuffers before(c, fixture);
  before.run_selection(*ref_, {});
  ref_->attend_sparse(before.attend_sparse_params(), {});

  const std::vector<std::int32_t> from = {fixture.kv().page_of(0, 0), fixture.kv().page_of(0, 3)};
  const std::vector<std::int32_t> to = {fixture.spare_page(1), fixture.spare_page(3)};
  ref_->copy_pages({.kv = fixture.kv(),
                    .index = fixture.index(),
                    .from = from.data(),
                    .to = to.data(),
                    .num_pages = 2});
  fixture.remap_page(0, 0, to[0]);
  fixture.remap_page(0, 3, to[1]);
  StepBuffers after(c, fixture);
  after.run_selection(*ref_, {});
  ref_->attend_sparse(after.attend_sparse_params(), {});
  EXPECT_EQ(before.kept, after.kept);
  for (std::int64_t h = 0; h < c.shape.num_q_heads; ++h) {
    EXPECT_TRUE(close(after.out_row(0, h), before.out_row(0, h), {.abs = 0, .rel = 0}));
  }
}

TEST_F(RefOps, PoisonDoesNotReachResults) {
  for (const OpCase& original : corner_cases()) {
    OpCase clean = original;
    clean.options.poison = false;
    const PagedFixture with = original.make_fixture();
    const PagedFixture without = clean.make_fixture();
    StepBuffers a(original, with);
    StepBuffers b(clean, without);
    a.run_selection(*ref_, {});
    b.run_selection(*ref_, {});
    EXPECT_EQ(a.kept, b.kept) << original.name;
    ref_->attend_dense(a.attend_dense_params(), {});
    ref_->attend_dense(b.attend_dense_params(), {});
    for (std::int64_t seq = 0; seq < with.num_seqs(); ++seq) {
      for (std::int64_t h = 0; h < original.shape.num_q_heads; ++h) {
        const std::span<const float> row = a.out_row(seq, h);
        EXPECT_TRUE(close(row, b.out_row(seq, h), {})) << original.name;
        const bool touched = !std::isnan(row[0]);
        EXPECT_EQ(touched, a.in_subset(seq)) << original.name;
        if (touched && with.kv().seq_lens[seq] == 0) {
          EXPECT_EQ(std::count(row.begin(), row.end(), 0.0F), std::ssize(row));
        }
      }
    }
  }
}

TEST_F(RefOps, PrefillIsDenseAttentionOverEveryPrefix) {
  OpCase c = find_case("group_4_dim_96");
  c.shape.lengths = {50};
  PagedFixture fixture = c.make_fixture();
  constexpr std::int32_t kTokens = 20;
  const std::int64_t row = std::int64_t{c.shape.num_q_heads} * c.shape.head_dim;
  std::vector<float> q(static_cast<std::size_t>(kTokens * (row + 4)));
  Random random(8);
  for (float& x : q) x = random.normal();
  std::vector<float> out(static_cast<std::size_t>(kTokens * (row + 2)), kNan);
  ref_->attend_prefill({.q = q.data(),
                        .q_token_stride = row + 4,
                        .num_q_heads = c.shape.num_q_heads,
                        .num_tokens = kTokens,
                        .kv = fixture.kv(),
                        .scale = fixture.scale(),
                        .out = out.data(),
                        .out_token_stride = row + 2});
  for (std::int32_t token = 0; token < kTokens; ++token) {
    fixture.set_length(0, 50 - kTokens + token + 1);
    StepBuffers dense(c, fixture);
    AttendDenseParams params = dense.attend_dense_params();
    params.q = {
        .data = q.data() + token * (row + 4), .seq_stride = row, .num_heads = c.shape.num_q_heads};
    ref_->attend_dense(params, {});
    const std::span<const float> got = std::span(out).subspan(
        static_cast<std::size_t>(token * (row + 2)), static_cast<std::size_t>(row));
    EXPECT_TRUE(close(got, std::span(dense.out).first(static_cast<std::size_t>(row)),
                      {.abs = 0, .rel = 0}));
    EXPECT_TRUE(std::isnan(out[static_cast<std::size_t>(token * (row + 2) + row)]));
  }
}

TEST_F(RefOps, AttentionFollowsTheFormula) {
  // Two keys with scores 0 and ln 3: weights 1/4 and 3/4.
  OpCase c = find_case("pages_in_order");
  c.shape = {.lengths = {2},
             .num_q_heads = 1,
             .num_kv_heads = 1,
             .head_dim = 8,
             .page_size = 2,
             .dtype = DType::kF32,
             .format = c.shape.format};
  PagedFixture fixture = c.make_fixture();
  std::vector<float> q(8, 0.0F);
  q[2] = std::log(3.0F);
  std::vector<float> k(8, 0.0F);
  fixture.set_k(0, 0, 0, k);
  k[2] = 1.0F;
  fixture.set_k(0, 1, 0, k);
  fixture.set_q(0, 0, q);
  fixture.set_v(0, 0, 0, std::vector<float>(8, 4.0F));
  fixture.set_v(0, 1, 0, std::vector<float>(8, 8.0F));
  StepBuffers step(c, fixture);
  AttendDenseParams params = step.attend_dense_params();
  params.scale = 1.0F;
  ref_->attend_dense(params, {});
  for (const float x : step.out_row(0, 0)) EXPECT_NEAR(x, 7.0F, 1e-6);
}

TEST_F(RefOps, ModelOpsByHand) {
  const std::vector<float> x = {1, 2, 3, 9, 4, 5, 6, 9};  // two rows of 3, stride 4
  std::vector<std::byte> weight(1 + 2 * 3 * 2);           // bf16 [2, 3] at an odd address
  const float w[] = {1, 0, -1, 0.5F, 2, 1};
  for (std::int64_t i = 0; i < 6; ++i) store_element(DType::kBf16, weight.data() + 1, i, w[i]);
  const std::vector<float> bias = {10, 20};
  std::vector<float> y(6, 100);
  LinearParams linear{
      .x = x.data(),
      .x_stride = 4,
      .num_rows = 2,
      .weight = {.data = weight.data() + 1, .dtype = DType::kBf16, .rows = 2, .cols = 3},
      .bias = bias.data(),
      .y = y.data(),
      .y_stride = 3};
  ref_->linear(linear);
  EXPECT_EQ(y, (std::vector<float>{8, 27.5F, 100, 8, 38, 100}));
  linear.accumulate = true;
  linear.bias = nullptr;
  ref_->linear(linear);
  EXPECT_EQ(y, (std::vector<float>{6, 35, 100, 6, 56, 100}));

  std::vector<float> rows = {3, 4, 0, 0, 0, 0, 0, 0};
  const std::vector<float> gain = {1, 2, 1, 1};
  ref_->rms_norm({.x = rows.data(),
                  .weight = gain.data(),
                  .y = rows.data(),
                  .num_rows = 2,
                  .hidden = 4,
                  .eps = 0.0625F});
  // mean of squares 6.25, with eps 6.3125
  EXPECT_NEAR(rows[0], 3 / std::sqrt(6.3125), 1e-6);
  EXPECT_NEAR(rows[1], 8 / std::sqrt(6.3125), 1e-6);
  EXPECT_EQ(rows[4], 0.0F);

  std::vector<float> turned = {1, 2, 3, 4, 5, 6, 7, 8};  // one token, two heads of 4
  const std::vector<float> cos = {0, 1};
  const std::vector<float> sin = {1, 0};
  ref_->rope({.x = turned.data(),
              .token_stride = 8,
              .num_tokens = 1,
              .num_heads = 2,
              .head_dim = 4,
              .cos = cos.data(),
              .sin = sin.data()});
  EXPECT_EQ(turned, (std::vector<float>{-3, 2, 1, 4, -7, 6, 5, 8}));

  std::vector<float> gate = {0, 1, -200, 200};
  const std::vector<float> up = {5, 2, 3, 0.5F};
  ref_->silu_mul({.gate = gate.data(), .up = up.data(), .y = gate.data(), .count = 4});
  EXPECT_EQ(gate[0], 0.0F);
  EXPECT_NEAR(gate[1], 2 / (1 + std::exp(-1.0)), 1e-6);
  EXPECT_NEAR(gate[2], 0.0F, 1e-30);
  EXPECT_EQ(gate[3], 100.0F);
}

TEST_F(RefOps, SupportNamesTheAxis) {
  StepCaps caps{.max_seqs = 1,
                .num_q_heads = 4,
                .num_kv_heads = 2,
                .head_dim = 128,
                .page_size = 16,
                .max_tokens = 100,
                .max_candidate_pages = 7};
  EXPECT_TRUE(ref_->supports(caps, DType::kBf16, {}));
  caps.head_dim = 100;
  EXPECT_NE(ref_->supports(caps, DType::kBf16, {}).reason.find("head_dim 100"), std::string::npos);
  caps.head_dim = 128;
  caps.page_size = 300;
  EXPECT_NE(ref_->supports(caps, DType::kBf16, {}).reason.find("page_size 300"), std::string::npos);
  caps.page_size = 16;
  caps.num_q_heads = 3;
  EXPECT_FALSE(ref_->supports(caps, DType::kBf16, {}));
  caps.num_q_heads = 4;
  EXPECT_FALSE(ref_->supports(caps, DType::kBf16, {.key_bits = 3}));
  EXPECT_EQ(ref_->workspace_bytes(caps), 0U);
}

}  // namespace
}  // namespace twilight::test
