#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "core/float16.h"
#include "cuda/host_cuda_backend.h"
#include "support/compare.h"
#include "support/random.h"

/// What surrounds attention in a forward pass, on the GPU against the scalar reference. Matrices
/// are scaled so that products are about N(0, 1); x rounds to the matrices' 16-bit dtype, 2^-9 of a
/// product for bf16, so sums of hundreds of products stay within 2e-2.
namespace twilight::test {
namespace {

/// A matrix of a dtype whose rows begin on 16-byte boundaries.
struct Weights {
  Weights(std::uint64_t seed, std::int64_t rows, std::int64_t cols, DType dtype)
      : values(normals(seed, rows * cols, 1.0F / std::sqrt(static_cast<float>(cols)))),
        stored(values.size() + 8) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      stored[i + first()] = dtype == DType::kBf16 ? f32_to_bf16(values[i]) : f32_to_f16(values[i]);
    }
    view = {reinterpret_cast<const std::byte*>(stored.data() + first()), dtype, rows, cols};
  }
  [[nodiscard]] std::size_t first() const {
    return (16 - reinterpret_cast<std::uintptr_t>(stored.data()) % 16) % 16 / 2;
  }

  std::vector<float> values;
  std::vector<std::uint16_t> stored;
  WeightView view;
};

struct BlockCase {
  std::int32_t m;
  std::int64_t hidden, inner;
  std::int32_t q_heads, kv_heads, head_dim;
  DType dtype;
  bool bias, head_norms, row_invariant;
};

class BlockCuda : public ::testing::TestWithParam<BlockCase> {
 protected:
  BlockCase c_ = GetParam();
  std::vector<float> x_ = normals(1, c_.m* c_.hidden, 3.0F);
  std::vector<float> norm_weight_ = normals(2, c_.hidden);
  Weights q_{3, std::int64_t{c_.q_heads} * c_.head_dim, c_.hidden, c_.dtype};
  Weights k_{4, std::int64_t{c_.kv_heads} * c_.head_dim, c_.hidden, c_.dtype};
  Weights v_{5, std::int64_t{c_.kv_heads} * c_.head_dim, c_.hidden, c_.dtype};
  Weights gate_{6, c_.inner, c_.hidden, c_.dtype};
  Weights up_{7, c_.inner, c_.hidden, c_.dtype};
  Weights down_{8, c_.hidden, c_.inner, c_.dtype};
  std::vector<float> bias_ = normals(9, std::max(q_.view.rows, c_.inner));
  std::vector<float> down_bias_ = normals(15, c_.hidden);
  std::vector<float> head_norm_ = normals(10, c_.head_dim);
  std::vector<float> cos_ = normals(11, c_.m*(c_.head_dim / 2));
  std::vector<float> sin_ = cos_;

  void SetUp() override {
    for (std::size_t i = 0; i < cos_.size(); ++i) {
      sin_[i] = std::sin(cos_[i]);
      cos_[i] = std::cos(cos_[i]);
    }
  }

  LinearParams product(const Weights& w, const float* x, float* y, std::int32_t rows) const {
    return {.x = x,
            .x_stride = w.view.cols,
            .num_rows = rows,
            .weight = w.view,
            .bias = c_.bias ? bias_.data() : nullptr,
            .y = y,
            .y_stride = w.view.rows,
            .row_invariant = c_.row_invariant};
  }

  /// q, k and v of rows [first, first + rows), one after the other.
  std::vector<std::vector<float>> project(Backend& backend, std::int32_t first, std::int32_t rows) {
    std::vector<float> x(x_.begin() + first * c_.hidden, x_.begin() + (first + rows) * c_.hidden);
    std::vector<float> normed(x.size());
    std::vector<std::vector<float>> out;
    for (const Weights* w : {&q_, &k_, &v_}) {
      out.emplace_back(static_cast<std::size_t>(rows * w->view.rows), 42.0F);
    }
    ProjectParams p;
    p.norm = {x.data(), norm_weight_.data(), normed.data(), rows, c_.hidden, 1e-5F};
    p.q = product(q_, normed.data(), out[0].data(), rows);
    p.k = product(k_, normed.data(), out[1].data(), rows);
    p.v = product(v_, normed.data(), out[2].data(), rows);
    const float* const head_norm = c_.head_norms ? head_norm_.data() : nullptr;
    const auto norm = [&](float* y, std::int32_t heads) -> RmsNormParams {
      return {y, head_norm, y, rows * heads, c_.head_dim, 1e-5F};
    };
    const std::int64_t at = std::int64_t{first} * (c_.head_dim / 2);
    const auto rope = [&](float* y, std::int32_t heads) -> RopeParams {
      return {y,
              std::int64_t{heads} * c_.head_dim,
              rows,
              heads,
              c_.head_dim,
              cos_.data() + at,
              sin_.data() + at};
    };
    p.q_norm = norm(out[0].data(), c_.q_heads);
    p.k_norm = norm(out[1].data(), c_.kv_heads);
    p.q_rope = rope(out[0].data(), c_.q_heads);
    p.k_rope = rope(out[1].data(), c_.kv_heads);
    backend.project(p);
    return out;
  }

  std::vector<float> feed(Backend& backend, std::int32_t first, std::int32_t rows) {
    std::vector<float> x(x_.begin() + first * c_.hidden, x_.begin() + (first + rows) * c_.hidden);
    std::vector<float> normed(x.size());
    std::vector<float> gate(static_cast<std::size_t>(rows * c_.inner));
    std::vector<float> up(gate.size());
    FeedForwardParams p;
    p.norm = {x.data(), norm_weight_.data(), normed.data(), rows, c_.hidden, 1e-5F};
    p.gate = product(gate_, normed.data(), gate.data(), rows);
    p.up = product(up_, normed.data(), up.data(), rows);
    p.down = product(down_, gate.data(), x.data(), rows);
    if (c_.bias) p.down.bias = down_bias_.data();
    p.down.accumulate = true;
    backend.feed_forward(p);
    return x;
  }
};

TEST_P(BlockCuda, ProjectMatchesReference) {
  const auto got = project(gpu(), 0, c_.m);
  const auto want = project(*make_ref_backend(), 0, c_.m);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(close(got[i], want[i], {.abs = 2e-2, .rel = 2e-2, .cosine = 1e-4})) << i;
  }
  if (!c_.row_invariant) return;
  for (const std::int32_t first : {0, c_.m / 2, c_.m - 1}) {
    const auto alone = project(gpu(), first, 1);
    for (std::size_t i = 0; i < 3; ++i) {
      const std::size_t row = alone[i].size();
      EXPECT_EQ(0,
                std::memcmp(alone[i].data(), got[i].data() + static_cast<std::size_t>(first) * row,
                            row * sizeof(float)));
    }
  }
}

TEST_P(BlockCuda, FeedForwardMatchesReference) {
  const std::vector<float> got = feed(gpu(), 0, c_.m);
  const std::vector<float> want = feed(*make_ref_backend(), 0, c_.m);
  EXPECT_TRUE(close(got, want, {.abs = 3e-2, .rel = 3e-2, .cosine = 1e-4}));
  if (!c_.row_invariant) return;
  for (const std::int32_t first : {0, c_.m / 2, c_.m - 1}) {
    const std::vector<float> alone = feed(gpu(), first, 1);
    EXPECT_EQ(
        0, std::memcmp(alone.data(), got.data() + first * c_.hidden, alone.size() * sizeof(float)));
  }
}

// A product alone: more columns than a warp's runs, rows that fill no tile.
TEST_P(BlockCuda, BatchesOfRowsGiveTheSameBits) {
  const auto run = [&](std::int32_t rows) {
    std::vector<float> y(static_cast<std::size_t>(rows * c_.hidden), 1.0F);
    LinearParams p = product(down_, nullptr, y.data(), rows);
    if (c_.bias) p.bias = down_bias_.data();
    const std::vector<float> x = normals(12, std::int64_t{rows} * c_.inner);
    p.x = x.data();
    p.row_invariant = true;
    p.accumulate = true;
    gpu().linear(p);
    return y;
  };
  const std::vector<float> all = run(64);
  for (const std::int32_t rows : {1, 2, 8, 9, 16, 17, 33}) {
    const std::vector<float> some = run(rows);
    EXPECT_EQ(0, std::memcmp(some.data(), all.data(), some.size() * sizeof(float))) << rows;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, BlockCuda,
    ::testing::Values(BlockCase{1, 384, 1024, 8, 2, 128, DType::kBf16, false, false, true},
                      BlockCase{5, 512, 1408, 8, 4, 64, DType::kBf16, true, false, true},
                      BlockCase{16, 1024, 2824, 4, 4, 128, DType::kF16, true, true, true},
                      BlockCase{20, 2048, 1032, 6, 2, 80, DType::kBf16, false, false, true},
                      BlockCase{64, 1032, 72, 3, 1, 96, DType::kBf16, true, false, true},
                      BlockCase{70, 256, 520, 4, 2, 64, DType::kF16, false, true, true},
                      BlockCase{33, 512, 1024, 4, 2, 64, DType::kBf16, true, true, false},
                      BlockCase{300, 256, 768, 4, 1, 128, DType::kF16, false, false, false},
                      BlockCase{3, 516, 1028, 2, 2, 66, DType::kBf16, false, false, true}));

TEST(BlockCudaSmall, Embed) {
  const Weights table(13, 57, 300, DType::kBf16);
  const std::vector<std::int32_t> tokens = {0, 56, 3, 3, 20};
  const auto run = [&](Backend& backend) {
    std::vector<float> out(tokens.size() * 300, 42.0F);
    backend.embed({table.view, tokens.data(), 5, out.data()});
    return out;
  };
  EXPECT_EQ(run(gpu()), run(*make_ref_backend()));
}

TEST(BlockCudaSmall, Rotation) {
  const std::vector<std::int32_t> positions = {0, 1, 131071, 77, 2048};
  std::vector<double> frequencies;
  for (int i = 0; i < 48; ++i) frequencies.push_back(std::pow(500000.0, -i / 48.0));
  const auto run = [&](Backend& backend) {
    std::vector<float> out(2 * positions.size() * frequencies.size(), 42.0F);
    backend.rotation(
        {positions.data(), frequencies.data(), 5, 48, out.data(), out.data() + out.size() / 2});
    return out;
  };
  EXPECT_TRUE(close(run(gpu()), run(*make_ref_backend()), {.abs = 1e-7, .rel = 1e-6}));
}

TEST(BlockCudaSmall, Argmax) {
  constexpr std::int64_t kCols = 5003;
  std::vector<float> x = normals(14, 6 * kCols);
  x[4000] = x[17] = 50.0F;                                     // equal: the first
  x[kCols + 5002] = 60.0F;                                     // the last
  x[2 * kCols + 3] = std::numeric_limits<float>::quiet_NaN();  // none
  x[3 * kCols + 3] = std::numeric_limits<float>::infinity();   // none
  std::fill_n(x.begin() + 4 * kCols, kCols, -std::numeric_limits<float>::infinity());
  x[5 * kCols + 9] = -std::numeric_limits<float>::infinity();
  const auto run = [&](Backend& backend) {
    std::vector<std::int32_t> out(6, 42);
    backend.argmax({x.data(), 6, kCols, out.data()});
    return out;
  };
  const std::vector<std::int32_t> want = run(*make_ref_backend());
  EXPECT_EQ(run(gpu()), want);
  EXPECT_EQ(std::vector<std::int32_t>(want.begin(), want.begin() + 5),
            (std::vector<std::int32_t>{17, 5002, -1, -1, -1}));
}

}  // namespace
}  // namespace twilight::test
