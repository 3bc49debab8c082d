#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "core/float16.h"
#include "cuda/host_cuda_backend.h"
#include "support/random.h"

/// Forward-pass ops of the GPU against the scalar reference, within bounds derived from their sums.
namespace twilight::test {
namespace {

constexpr double kUlp = 0x1p-24;

struct LinearCase {
  std::int32_t m;
  std::int64_t rows, cols;
  DType dtype;
  bool bias, accumulate, full_precision, row_invariant;
  std::int64_t pad;     ///< floats between rows of x and of y
  std::int64_t offset;  ///< bytes that push the weights off their alignment
};

class LinearCuda : public ::testing::TestWithParam<LinearCase> {};

// As many roundings as terms, and where x rounds to the weights' dtype 2^-9 (bf16) or 2^-11 (f16)
// of every product more.
TEST_P(LinearCuda, MatchesReference) {
  const LinearCase& c = GetParam();
  const std::vector<float> bias = normals(3, c.rows);
  const std::vector<float> before = normals(4, c.m * (c.rows + c.pad));
  std::vector<float> weights = normals(5, c.rows * c.cols);
  std::vector<float> x = normals(6, c.m * (c.cols + c.pad));
  for (std::int64_t m = 0; m < c.m; ++m) {
    for (std::int64_t i = c.cols; i < c.cols + c.pad; ++i) {
      x[static_cast<std::size_t>(m * (c.cols + c.pad) + i)] =
          std::numeric_limits<float>::quiet_NaN();
    }
  }
  const std::int64_t bytes = dtype_bytes(c.dtype);
  std::vector<std::byte> stored(weights.size() * static_cast<std::size_t>(bytes) + 64);
  const auto base = reinterpret_cast<std::uintptr_t>(stored.data());
  std::byte* const at = stored.data() + (32 - base % 32) % 32 + c.offset;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    std::byte* const to = at + static_cast<std::int64_t>(i) * bytes;
    if (c.dtype == DType::kF32) {
      std::memcpy(to, &weights[i], sizeof(float));
      continue;
    }
    const bool bf16 = c.dtype == DType::kBf16;
    const std::uint16_t bits = bf16 ? f32_to_bf16(weights[i]) : f32_to_f16(weights[i]);
    weights[i] = bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    std::memcpy(to, &bits, sizeof bits);
  }
  const auto run = [&](Backend& backend, std::int32_t first, std::int32_t count) {
    std::vector<float> y(before.begin() + first * (c.rows + c.pad),
                         before.begin() + (first + count) * (c.rows + c.pad));
    backend.linear({.x = x.data() + first * (c.cols + c.pad),
                    .x_stride = c.cols + c.pad,
                    .num_rows = count,
                    .weight = {at, c.dtype, c.rows, c.cols},
                    .bias = c.bias ? bias.data() : nullptr,
                    .y = y.data(),
                    .y_stride = c.rows + c.pad,
                    .accumulate = c.accumulate,
                    .row_invariant = c.row_invariant,
                    .full_precision = c.full_precision});
    return y;
  };
  const std::vector<float> got = run(gpu(), 0, c.m);
  const std::vector<float> want = run(*make_ref_backend(), 0, c.m);
  const double rounding = c.full_precision || c.dtype == DType::kF32 ? 0.0
                          : c.dtype == DType::kBf16                  ? 0x1p-9
                                                                     : 0x1p-11;
  for (std::int64_t m = 0; m < c.m; ++m) {
    for (std::int64_t row = 0; row < c.rows + c.pad; ++row) {
      const auto i = static_cast<std::size_t>(m * (c.rows + c.pad) + row);
      if (row >= c.rows) {
        ASSERT_EQ(got[i], before[i]) << "wrote behind row " << m;
        continue;
      }
      double products = 0;
      for (std::int64_t d = 0; d < c.cols; ++d) {
        products += std::abs(double{x[static_cast<std::size_t>(m * (c.cols + c.pad) + d)]} *
                             double{weights[static_cast<std::size_t>(row * c.cols + d)]});
      }
      const double size = products * (1 + rounding) +
                          std::abs(bias[static_cast<std::size_t>(row)]) + std::abs(before[i]);
      ASSERT_NEAR(got[i], want[i],
                  static_cast<double>(c.cols + 8) * 2 * kUlp * size + rounding * products)
          << "at " << m << ", " << row;
    }
  }
  if (!c.row_invariant) return;
  for (const std::int32_t first : {0, c.m / 2, c.m - 1}) {
    const std::vector<float> alone = run(gpu(), first, 1);
    EXPECT_EQ(0, std::memcmp(alone.data(), got.data() + first * (c.rows + c.pad),
                             static_cast<std::size_t>(c.rows) * sizeof(float)))
        << "row " << first;
  }
}

std::vector<LinearCase> linear_cases() {
  std::vector<LinearCase> cases;
  int i = 0;
  for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
    for (const std::int32_t m : {1, 3, 17, 64, 100}) {
      for (const bool invariant : {false, true}) {
        ++i;
        cases.push_back({m, 96 + 8 * (i % 5), 64 * (1 + i % 3), dtype, i % 2 == 0, i % 3 == 0,
                         i % 4 == 0, invariant, i % 4, 0});
      }
    }
    cases.push_back({5, 67, 129, dtype, true, true, false, true, 1, 1});  // off its alignment
    cases.push_back({70, 33, 7, dtype, true, false, false, false, 0, 0});
    cases.push_back({1, 1, 1, dtype, false, false, false, false, 0, 0});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, LinearCuda, ::testing::ValuesIn(linear_cases()));

TEST(ModelCuda, RmsNorm) {
  for (const std::int64_t hidden : {1, 7, 64, 384, 1001, 4096}) {
    const std::int32_t rows = 5;
    std::vector<float> x = normals(7, rows * hidden);
    for (std::int64_t i = 0; i < hidden; ++i) x[static_cast<std::size_t>(i)] = 0;
    x[static_cast<std::size_t>(hidden)] *= 1e12F;
    const std::vector<float> weight = normals(8, hidden);
    const auto run = [&](Backend& backend, bool in_place) {
      std::vector<float> y(x);
      backend.rms_norm(
          {in_place ? y.data() : x.data(), weight.data(), y.data(), rows, hidden, 1e-5F});
      return y;
    };
    const std::vector<float> got = run(gpu(), false);
    EXPECT_EQ(got, run(gpu(), true));
    const std::vector<float> want = run(*make_ref_backend(), false);
    const double bound = (static_cast<double>(hidden) / 2 + 8) * kUlp;
    for (std::size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(got[i], want[i], bound * std::abs(double{want[i]}) + 1e-40) << i;
    }
  }
}

TEST(ModelCuda, Rope) {
  for (const std::int32_t head_dim : {2, 6, 64, 128}) {
    const std::int32_t heads = 3;
    const std::int32_t tokens = 70;
    const std::int64_t half = head_dim / 2;
    const std::int64_t stride = std::int64_t{heads} * head_dim + 5;
    const std::vector<float> before = normals(9, tokens * stride);
    std::vector<float> cos = normals(10, tokens * half);
    std::vector<float> sin(cos.size());
    for (std::size_t i = 0; i < cos.size(); ++i) {
      sin[i] = std::sin(cos[i]);
      cos[i] = std::cos(cos[i]);
    }
    const auto run = [&](Backend& backend) {
      std::vector<float> x = before;
      backend.rope({x.data(), stride, tokens, heads, head_dim, cos.data(), sin.data()});
      return x;
    };
    const std::vector<float> got = run(gpu());
    const std::vector<float> want = run(*make_ref_backend());
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 2e-6) << i;
  }
}

TEST(ModelCuda, SiluMul) {
  std::vector<float> gate = {0.0F,   -0.0F,  1e-30F, 20.0F, -20.0F, 80.0F,   -88.5F,
                             -104.F, 110.0F, -1e10F, 3e38F, 1.0F,   -1000.0F};
  for (int i = 0; i < 9000; ++i) gate.push_back(static_cast<float>(i - 4500) * 0.01F);
  const std::vector<float> up = normals(12, std::ssize(gate));
  const auto run = [&](Backend& backend) {
    std::vector<float> y(gate.size(), 42.0F);
    backend.silu_mul({gate.data(), up.data(), y.data(), std::ssize(gate)});
    return y;
  };
  const std::vector<float> got = run(gpu());
  const std::vector<float> want = run(*make_ref_backend());
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (std::isinf(want[i])) {
      ASSERT_EQ(got[i], want[i]);
      continue;
    }
    // Where e^-gate overflows f32 the gate counts as 0.
    ASSERT_NEAR(got[i], want[i], 12 * kUlp * std::abs(double{want[i]}) + 1e-35) << gate[i];
  }
}

}  // namespace
}  // namespace twilight::test
