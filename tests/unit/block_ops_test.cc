#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "ops/backend.h"
#include "support/expect_error.h"
#include "support/random.h"

/// Ops around attention on host memory, by hand; and that groups are their parts.
namespace twilight::test {
namespace {

WeightView view_of(const std::vector<float>& values, std::int64_t rows, std::int64_t cols) {
  return {reinterpret_cast<const std::byte*>(values.data()), DType::kF32, rows, cols};
}

TEST(BlockOps, EmbedTakesRows) {
  const std::vector<float> table = {1, 2, 3, 4, 5, 6};
  const std::vector<std::int32_t> tokens = {2, 0, 2};
  std::vector<float> out(6);
  make_ref_backend()->embed({view_of(table, 3, 2), tokens.data(), 3, out.data()});
  EXPECT_EQ(out, (std::vector<float>{5, 6, 1, 2, 5, 6}));
}

TEST(BlockOps, RotationIsOfPositionTimesFrequency) {
  const std::vector<std::int32_t> positions = {0, 3};
  const std::vector<double> frequencies = {1.0, 0.25};
  std::vector<float> cos(4);
  std::vector<float> sin(4);
  make_ref_backend()->rotation(
      {positions.data(), frequencies.data(), 2, 2, cos.data(), sin.data()});
  EXPECT_EQ(cos[0], 1.0F);
  EXPECT_EQ(sin[1], 0.0F);
  EXPECT_FLOAT_EQ(cos[2], static_cast<float>(std::cos(3.0)));
  EXPECT_FLOAT_EQ(sin[3], static_cast<float>(std::sin(0.75)));
}

TEST(BlockOps, ArgmaxTakesTheFirstOfEqualAndNoneOfBroken) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {1,
                                7,
                                7,  //
                                -kInf,
                                2,
                                kInf,  //
                                std::nanf(""),
                                1,
                                2,  //
                                -kInf,
                                -kInf,
                                -kInf,  //
                                -3,
                                -kInf,
                                -5};
  std::vector<std::int32_t> out(5);
  make_ref_backend()->argmax({x.data(), 5, 3, out.data()});
  EXPECT_EQ(out, (std::vector<std::int32_t>{1, -1, -1, -1, 0}));
}

// Two candidates of which one has mass, and far pages above and below the floor.
TEST(BlockOps, CountTail) {
  const std::vector<float> mass = {0, 0.5F, 0, 0};  // two heads, two candidates
  const std::vector<std::int32_t> pages = {1, 3};
  const std::vector<std::int32_t> page_counts = {2};
  const std::vector<float> scores = {0.0F, 0.0F, -9.0F, 0.0F, -0.5F};
  const std::vector<float> log_masses(10);
  const std::int32_t length = 83;  // five sealed pages and an open one
  CountTailParams params;
  params.seqs.count = 1;
  params.kv.num_seqs = params.kv.num_kv_heads = 1;
  params.kv.head_dim = 8;
  params.kv.page_size = 16;
  params.kv.seq_lens = &length;
  params.num_q_heads = 2;
  params.tail.mass = mass.data();
  params.tail.pages = pages.data();
  params.tail.page_counts = page_counts.data();
  params.tail.candidate_stride = 2;
  std::int32_t count = 42;
  params.counts = &count;
  const std::unique_ptr<Backend> backend = make_ref_backend();
  backend->count_tail(params, {});
  EXPECT_EQ(count, 1);
  params.tail.log_masses = log_masses.data();
  params.tail.scores = scores.data();
  params.tail.page_stride = 5;
  params.tail.far_floor = 1.0F;  // log(1 / 5) = -1.6: pages 0 and 4
  backend->count_tail(params, {});
  EXPECT_EQ(count, 3);
}

class BlockGroups : public ::testing::Test {
 protected:
  static constexpr std::int32_t kRows = 3;
  static constexpr std::int64_t kHidden = 12;
  static constexpr std::int64_t kInner = 20;
  static constexpr std::int32_t kDim = 4;
  std::unique_ptr<Backend> backend_ = make_ref_backend();
  std::vector<float> x_ = normals(1, kRows* kHidden);
  std::vector<float> norm_ = normals(2, kHidden);
  std::vector<float> head_norm_ = normals(3, kDim);
  std::vector<float> q_ = normals(4, 8 * kHidden);
  std::vector<float> k_ = normals(5, 4 * kHidden);
  std::vector<float> gate_ = normals(6, kInner* kHidden);
  std::vector<float> up_ = normals(7, kInner* kHidden);
  std::vector<float> down_ = normals(8, kHidden* kInner);
  std::vector<float> cos_ = normals(9, kRows* kDim / 2);
  std::vector<float> normed_ = std::vector<float>(kRows * kHidden);

  static LinearParams product(const std::vector<float>& w, std::int64_t rows, std::int64_t cols,
                              const std::vector<float>& x, std::vector<float>& y) {
    LinearParams p;
    p.x = x.data();
    p.x_stride = cols;
    p.num_rows = kRows;
    p.weight = view_of(w, rows, cols);
    p.y = y.data();
    p.y_stride = rows;
    return p;
  }
  RmsNormParams norm() { return {x_.data(), norm_.data(), normed_.data(), kRows, kHidden, 1e-5F}; }
};

TEST_F(BlockGroups, ProjectIsItsParts) {
  std::vector<float> q(kRows * 8), k(kRows * 4), v(kRows * 4);
  ProjectParams p;
  p.norm = norm();
  p.q = product(q_, 8, kHidden, normed_, q);
  p.k = product(k_, 4, kHidden, normed_, k);
  p.v = product(k_, 4, kHidden, normed_, v);
  p.q_norm = {q.data(), head_norm_.data(), q.data(), kRows * 2, kDim, 1e-5F};
  p.k_norm = {k.data(), nullptr, k.data(), kRows, kDim, 1e-5F};
  p.q_rope = {q.data(), 8, kRows, 2, kDim, cos_.data(), cos_.data()};
  p.k_rope = {k.data(), 4, kRows, 1, kDim, cos_.data(), cos_.data()};
  backend_->project(p);
  const std::vector<float> got_q = q, got_k = k, got_v = v;
  backend_->rms_norm(p.norm);
  backend_->linear(p.q);
  backend_->linear(p.k);
  backend_->linear(p.v);
  backend_->rms_norm(p.q_norm);
  backend_->rope(p.q_rope);
  backend_->rope(p.k_rope);
  EXPECT_EQ(got_q, q);
  EXPECT_EQ(got_k, k);
  EXPECT_EQ(got_v, v);
  ProjectParams bad = p;
  bad.k.x = x_.data();
  expect_error(ErrorCode::kInvalidArgument, {"[project]", "norm.y"},
               [&] { backend_->project(bad); });
  bad = p;
  bad.k_rope.x = q.data();
  expect_error(ErrorCode::kInvalidArgument, {"[project]", "k.y"}, [&] { backend_->project(bad); });
}

TEST_F(BlockGroups, FeedForwardIsItsParts) {
  std::vector<float> gate(kRows * kInner), up(kRows * kInner);
  FeedForwardParams p;
  p.norm = norm();
  p.gate = product(gate_, kInner, kHidden, normed_, gate);
  p.up = product(up_, kInner, kHidden, normed_, up);
  p.down = product(down_, kHidden, kInner, gate, x_);
  p.down.accumulate = true;
  const std::vector<float> before = x_;
  backend_->feed_forward(p);
  const std::vector<float> got = x_;
  x_ = before;
  backend_->rms_norm(p.norm);
  backend_->linear(p.gate);
  backend_->linear(p.up);
  backend_->silu_mul({gate.data(), up.data(), gate.data(), kRows * kInner});
  backend_->linear(p.down);
  EXPECT_EQ(got, x_);
  FeedForwardParams bad = p;
  bad.down.x = up.data();
  expect_error(ErrorCode::kInvalidArgument, {"[feed_forward]", "inner"},
               [&] { backend_->feed_forward(bad); });
  bad = p;
  bad.up.x = x_.data();
  expect_error(ErrorCode::kInvalidArgument, {"[feed_forward]", "norm.y"},
               [&] { backend_->feed_forward(bad); });
}

TEST_F(BlockGroups, AdvanceLayerIsItsParts) {
  std::vector<float> gate(kRows * kInner), up(kRows * kInner), mixed(kRows * kInner, 0.5F);
  std::vector<float> q(kRows * 8), k(kRows * 4), v(kRows * 4);
  AdvanceLayerParams p;
  p.out = product(down_, kHidden, kInner, mixed, x_);
  p.out.accumulate = true;
  p.feed.norm = norm();
  p.feed.gate = product(gate_, kInner, kHidden, normed_, gate);
  p.feed.up = product(up_, kInner, kHidden, normed_, up);
  p.feed.down = product(down_, kHidden, kInner, gate, x_);
  p.feed.down.accumulate = true;
  ProjectParams next;
  next.norm = norm();
  next.q = product(q_, 8, kHidden, normed_, q);
  next.k = product(k_, 4, kHidden, normed_, k);
  next.v = product(k_, 4, kHidden, normed_, v);
  next.q_rope = {q.data(), 8, kRows, 2, kDim, cos_.data(), cos_.data()};
  next.k_rope = {k.data(), 4, kRows, 1, kDim, cos_.data(), cos_.data()};
  p.next = &next;
  // Two pages of two tokens, head-major.
  std::vector<float> k_cache(16, 42.0F), v_cache(16, 42.0F);
  std::vector<std::int64_t> slots(kRows);
  for (int i = 0; i < kRows; ++i) slots[static_cast<std::size_t>(i)] = (i + 1) % 4;
  AppendKvParams append;
  append.kv.dtype = DType::kF32;
  append.kv.num_kv_heads = 1;
  append.kv.head_dim = 4;
  append.kv.page_size = 2;
  append.kv.k = {reinterpret_cast<std::byte*>(k_cache.data()), 8, 16, 4};
  append.kv.v = {reinterpret_cast<std::byte*>(v_cache.data()), 8, 16, 4};
  append.k = k.data();
  append.v = v.data();
  append.k_token_stride = append.v_token_stride = 4;
  append.slots = slots.data();
  append.num_tokens = kRows;
  p.append = &append;
  const std::vector<float> before = x_;
  backend_->advance_layer(p);
  const std::vector<float> got = x_, got_q = q, got_v = v;
  for (std::size_t i = 0; i < v.size(); ++i) {
    const auto at = static_cast<std::size_t>(slots[i / 4]) * 4 + i % 4;
    EXPECT_EQ(k_cache[at], k[i]);
    EXPECT_EQ(v_cache[at], v[i]);
  }
  EXPECT_NE(got, before);
  x_ = before;
  backend_->linear(p.out);
  backend_->feed_forward(p.feed);
  backend_->project(next);
  EXPECT_EQ(got, x_);
  EXPECT_EQ(got_q, q);
  EXPECT_EQ(got_v, v);
  AdvanceLayerParams other = p;
  append.v = q.data();
  expect_error(ErrorCode::kInvalidArgument, {"[advance_layer]", "append of other rows"},
               [&] { backend_->advance_layer(other); });
  other.next = nullptr;
  expect_error(ErrorCode::kInvalidArgument, {"[advance_layer]", "append without next"},
               [&] { backend_->advance_layer(other); });
  p.next = nullptr;
  p.append = nullptr;
  x_ = before;
  q.assign(q.size(), 42.0F);
  backend_->advance_layer(p);
  EXPECT_EQ(got, x_);
  EXPECT_EQ(q, std::vector<float>(q.size(), 42.0F));
  AdvanceLayerParams bad = p;
  bad.out.accumulate = false;
  expect_error(ErrorCode::kInvalidArgument, {"[advance_layer]", "feed.norm.x"},
               [&] { backend_->advance_layer(bad); });
  bad = p;
  next.norm.x = mixed.data();
  bad.next = &next;
  expect_error(ErrorCode::kInvalidArgument, {"[advance_layer]", "next"},
               [&] { backend_->advance_layer(bad); });
}

TEST(BlockOps, BadFieldsAreNamed) {
  const std::unique_ptr<Backend> backend = make_ref_backend();
  const std::vector<float> table(4);
  const std::int32_t token = 0;
  std::vector<float> out(4);
  expect_error(ErrorCode::kInvalidArgument, {"[embed]", "tokens", "null"}, [&] {
    backend->embed({view_of(table, 2, 2), nullptr, 1, out.data()});
  });
  expect_error(ErrorCode::kInvalidArgument, {"[rotation]", "half", "got 0"}, [&] {
    backend->rotation({&token, nullptr, 1, 0, out.data(), out.data()});
  });
  expect_error(ErrorCode::kInvalidArgument, {"[argmax]", "out", "null"}, [&] {
    backend->argmax({out.data(), 1, 4, nullptr});
  });
}

}  // namespace
}  // namespace twilight::test
