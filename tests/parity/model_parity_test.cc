#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/model.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "support/linear_check.h"
#include "support/random.h"
#include "support/same_bits.h"

/// The model's own ops on every instruction set of this machine against the scalar reference:
/// values within bounds derived beside each test, bits the same for any number of threads, padding
/// untouched.
namespace twilight::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kUlp = 0x1p-24;  // half a unit in the last place of f32, relative

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

class ModelParity : public ::testing::TestWithParam<std::string> {
 protected:
  // Runs `op` with 1, 2, 3 and 8 threads; expects the same bits and returns them.
  std::vector<float> run(const std::function<std::vector<float>(Backend&)>& op) const {
    std::vector<float> first;
    for (const int threads : {1, 2, 3, 8}) {
      ThreadPool pool(threads);
      const auto backend = make_cpu_backend(pool, GetParam());
      std::vector<float> out = op(*backend);
      if (threads == 1) {
        first = std::move(out);
      } else {
        EXPECT_TRUE(same_bits(first, out)) << threads << " threads";
      }
    }
    return first;
  }

  const std::unique_ptr<Backend> ref_ = make_ref_backend();
};

struct LinearCase {
  std::int32_t m;
  std::int64_t rows, cols;
  DType dtype;
  bool bias, accumulate, full_precision;
  std::int64_t pad;     // floats between the rows of x (NaN) and of y
  std::int64_t offset;  // bytes that push the weights off their alignment
};

std::ostream& operator<<(std::ostream& out, const LinearCase& c) {
  return out << "m " << c.m << " rows " << c.rows << " cols " << c.cols << ' '
             << dtype_name(c.dtype) << (c.bias ? " bias" : "")
             << (c.accumulate ? " accumulate" : "") << (c.full_precision ? " full" : "") << " pad "
             << c.pad << " offset " << c.offset;
}

// Operands of one product; f64 sums of |terms| for the bounds.
class LinearProblem {
 public:
  explicit LinearProblem(const LinearCase& shape)
      : c(shape),
        bias_(normals(3, c.rows)),
        before_(normals(4, c.m * (c.rows + c.pad))),
        weights_(normals(5, c.rows * c.cols)) {
    const std::vector<float> dense = normals(6, std::int64_t{c.m} * c.cols);
    x_.assign(static_cast<std::size_t>(c.m * (c.cols + c.pad)), kNan);
    for (std::int64_t m = 0; m < c.m; ++m) {
      std::memcpy(x_.data() + m * (c.cols + c.pad), dense.data() + m * c.cols,
                  static_cast<std::size_t>(c.cols) * sizeof(float));
    }
    const std::int64_t bytes = dtype_bytes(c.dtype);
    stored_.resize(static_cast<std::size_t>(c.rows * c.cols * bytes + c.offset));
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      std::byte* to = stored_.data() + c.offset + static_cast<std::int64_t>(i) * bytes;
      if (c.dtype == DType::kF32) {
        std::memcpy(to, &weights_[i], sizeof(float));
        continue;
      }
      const bool bf16 = c.dtype == DType::kBf16;
      const std::uint16_t bits = bf16 ? f32_to_bf16(weights_[i]) : f32_to_f16(weights_[i]);
      weights_[i] = bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
      std::memcpy(to, &bits, sizeof(bits));
    }
  }

  [[nodiscard]] std::vector<float> run(Backend& backend) const {
    std::vector<float> y = before_;
    backend.linear({.x = x_.data(),
                    .x_stride = c.cols + c.pad,
                    .num_rows = c.m,
                    .weight = {stored_.data() + c.offset, c.dtype, c.rows, c.cols},
                    .bias = c.bias ? bias_.data() : nullptr,
                    .y = y.data(),
                    .y_stride = c.rows + c.pad,
                    .accumulate = c.accumulate,
                    .full_precision = c.full_precision});
    return y;
  }

  // Where x and W round to bf16 (8 significant bits, 2^-9 each, none for W that is bf16 already)
  // the products move by 2^-9, or 2^-8 + 2^-18.
  void check(const std::vector<float>& actual, const std::vector<float>& expected,
             bool may_use_bf16) const {
    const double rounding =
        !may_use_bf16 ? 0.0 : (c.dtype == DType::kBf16 ? 0x1p-9 : 0x1p-8 + 0x1p-18);
    check_products({c.m, c.rows, c.cols, c.pad, x_, weights_, c.bias ? &bias_ : nullptr, before_,
                    c.accumulate},
                   actual, expected, rounding, c);
  }

  LinearCase c;

 private:
  std::vector<float> bias_, before_, weights_, x_;
  std::vector<std::byte> stored_;
};

TEST_P(ModelParity, LinearOfFewRows) {
  constexpr std::int64_t kSizes[][2] = {{1, 1}, {5, 3}, {67, 129}, {64, 384}, {131, 100}, {3, 700}};
  std::int64_t i = 0;
  for (std::int32_t m = 1; m <= cpu::kMatvecMaxRows; ++m) {
    for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
      for (const auto& size : kSizes) {
        ++i;
        const LinearProblem problem(
            {m, size[0], size[1], dtype, i % 2 == 0, i % 3 == 0, i % 5 == 0, i % 4, i % 3});
        const auto actual = run([&](Backend& backend) { return problem.run(backend); });
        problem.check(actual, problem.run(*ref_), /*may_use_bf16=*/false);
      }
    }
  }
}

TEST_P(ModelParity, LinearOfManyRows) {
  const bool bf16 = GetParam() == "avx512_bf16";
  std::int64_t i = 0;
  for (const std::int32_t m : {cpu::kMatvecMaxRows + 1, 16, 45}) {
    for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
      for (const bool full : {false, true}) {
        ++i;
        const LinearProblem problem(
            {m, 65 + i, 33 + 8 * i, dtype, i % 2 == 0, i % 3 == 0, full, i % 4, i % 3});
        const auto actual = run([&](Backend& backend) { return problem.run(backend); });
        problem.check(actual, problem.run(*ref_), bf16 && !full);
      }
    }
  }
}

// A row's result does not depend on the rows beside it, so a sequence decodes the same alone.
TEST_P(ModelParity, MatvecRowsDoNotDependOnTheBatch) {
  ThreadPool pool(2);
  const auto backend = make_cpu_backend(pool, GetParam());
  constexpr std::int64_t kRows = 37;
  constexpr std::int64_t kCols = 131;
  const std::vector<float> weights = normals(1, kRows * kCols);
  const std::vector<float> x = normals(2, cpu::kMatvecMaxRows * kCols);
  const auto product = [&](std::int32_t first, std::int32_t count) {
    std::vector<float> y(static_cast<std::size_t>(count * kRows));
    LinearParams params;
    params.x = x.data() + first * kCols;
    params.x_stride = kCols;
    params.num_rows = count;
    params.weight = {reinterpret_cast<const std::byte*>(weights.data()), DType::kF32, kRows, kCols};
    params.y = y.data();
    params.y_stride = kRows;
    backend->linear(params);
    return y;
  };
  std::vector<float> one_by_one;
  for (std::int32_t m = 0; m < cpu::kMatvecMaxRows; ++m) {
    for (const float value : product(m, 1)) one_by_one.push_back(value);
    const std::vector<float> together = product(0, m + 1);
    EXPECT_TRUE(same_bits(together, one_by_one)) << m + 1 << " rows";
  }
}

// The f32 sum of the squares is off by at most hidden 2^-24 of itself, half of that after the root;
// root, reciprocal, the two products and the reference's rounding add 5 2^-24.
TEST_P(ModelParity, RmsNorm) {
  for (const std::int64_t hidden : {1, 7, 64, 384, 1001}) {
    for (const std::int32_t rows : {1, 3, 40}) {
      const std::int64_t count = rows * hidden;
      std::vector<float> x = normals(7, count);
      if (rows == 3) {
        for (std::int64_t i = 0; i < hidden; ++i) {
          x[static_cast<std::size_t>(i)] = 0;                                      // a row of zeros
          x[static_cast<std::size_t>(2 * hidden + i)] *= i == 0 ? 1e12F : 1e-12F;  // one huge
        }
      }
      const std::vector<float> weight = normals(8, hidden);
      const auto apply = [&](Backend& backend, bool in_place) {
        constexpr std::size_t kGuard = 3;
        std::vector<float> y(x);
        y.insert(y.end(), kGuard, 42.0F);
        backend.rms_norm(
            {in_place ? y.data() : x.data(), weight.data(), y.data(), rows, hidden, 1e-5F});
        for (std::size_t i = 0; i < kGuard; ++i) {
          EXPECT_EQ(y[static_cast<std::size_t>(count) + i], 42.0F);
        }
        return y;
      };
      const auto actual = run([&](Backend& backend) { return apply(backend, false); });
      EXPECT_TRUE(same_bits(actual, run([&](Backend& backend) { return apply(backend, true); })));
      const std::vector<float> expected = apply(*ref_, false);
      const double bound = (static_cast<double>(hidden) / 2 + 5) * kUlp;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(actual[i], expected[i], bound * std::abs(double{expected[i]}) + 0x1p-148)
            << "hidden " << hidden << " rows " << rows << " element " << i;
      }
    }
  }
}

// Two products, one sum: at most 2^-24 (|a c| + |b s|) for the products, as much for the sum, and
// the same again for the reference's rounding.
TEST_P(ModelParity, Rope) {
  for (const std::int32_t head_dim : {2, 6, 64, 80, 128}) {
    for (const std::int32_t heads : {1, 3}) {
      for (const std::int32_t tokens : {1, 5, 70}) {
        const std::int64_t half = head_dim / 2;
        const std::int64_t stride = std::int64_t{heads} * head_dim + 5;
        const std::vector<float> before = normals(9, tokens * stride);
        std::vector<float> cos = normals(10, tokens * half);
        std::vector<float> sin(cos.size());
        for (std::size_t i = 0; i < cos.size(); ++i) {
          sin[i] = std::sin(cos[i]);
          cos[i] = std::cos(cos[i]);
        }
        const auto apply = [&](Backend& backend) {
          std::vector<float> x = before;
          backend.rope({x.data(), stride, tokens, heads, head_dim, cos.data(), sin.data()});
          return x;
        };
        const auto actual = run(apply);
        const std::vector<float> expected = apply(*ref_);
        for (std::int64_t at = 0; at < tokens * stride; ++at) {
          const auto i = static_cast<std::size_t>(at);
          const std::int64_t in_row = at % stride;
          if (in_row >= std::int64_t{heads} * head_dim) {
            ASSERT_EQ(actual[i], before[i]) << "padding at " << at;
            continue;
          }
          const std::int64_t d = in_row % head_dim;
          const auto pair = static_cast<std::size_t>(d < half ? at + half : at - half);
          const auto angle = static_cast<std::size_t>(at / stride * half + d % half);
          const double size = std::abs(double{before[i]} * double{cos[angle]}) +
                              std::abs(double{before[pair]} * double{sin[angle]});
          ASSERT_NEAR(actual[i], expected[i], 3 * kUlp * size)
              << "head_dim " << head_dim << " tokens " << tokens << " at " << at;
        }
      }
    }
  }
}

// exp to 2^-23 of itself, then sum, quotient, product and the reference, 2^-24 each: 6 2^-24 of the
// result. Where exp(-gate) overflows f32 the gate is taken as 0, at most 89 2^-128 |up| away.
TEST_P(ModelParity, SiluMul) {
  std::vector<float> gate = {0.0F,    -0.0F,  1e-30F,  -1e-30F, 20.0F,  -20.0F,   80.0F,
                             -80.0F,  -87.0F, -88.5F,  -89.0F,  89.0F,  -103.0F,  -104.5F,
                             -110.0F, 110.0F, -150.0F, -200.0F, 200.0F, -1000.0F, 1000.0F,
                             -1e10F,  1e10F,  -3e38F,  3e38F};
  for (int i = 0; i < 400; ++i) gate.push_back(static_cast<float>(i - 200) * 1.37F);
  for (const std::int64_t count : {1, 3, 17, 64, 425, 9001}) {
    std::vector<float> g = normals(11, count);
    for (std::size_t i = 0; i < g.size(); ++i) g[i] = i < gate.size() ? gate[i] : 8 * g[i];
    const std::vector<float> up = normals(12, count);
    const auto apply = [&](Backend& backend, bool in_place) {
      std::vector<float> y = in_place ? g : std::vector<float>(g.size(), 42.0F);
      y.push_back(42.0F);
      backend.silu_mul({in_place ? y.data() : g.data(), up.data(), y.data(), count});
      EXPECT_EQ(y.back(), 42.0F);
      return y;
    };
    const auto actual = run([&](Backend& backend) { return apply(backend, false); });
    EXPECT_TRUE(same_bits(actual, run([&](Backend& backend) { return apply(backend, true); })));
    const std::vector<float> expected = apply(*ref_, false);
    for (std::size_t i = 0; i < g.size(); ++i) {
      if (std::isinf(expected[i])) {
        ASSERT_EQ(actual[i], expected[i]) << "gate " << g[i];
        continue;
      }
      const double bound = 6 * kUlp * std::abs(double{expected[i]}) +
                           89 * 0x1p-128 * std::abs(double{up[i]}) + 0x1p-148;
      ASSERT_NEAR(actual[i], expected[i], bound) << "gate " << g[i] << " up " << up[i];
    }
  }
}

TEST_P(ModelParity, SiluMulKeepsTheSignOfZeroAndNan) {
  ThreadPool pool(1);
  const auto backend = make_cpu_backend(pool, GetParam());
  const std::vector<float> gate = {0.0F, -0.0F, kNan, kInfinity, -500.0F, 1.0F};
  const std::vector<float> up = {1.0F, 1.0F, 1.0F, 1.0F, 1.0F, kNan};
  std::vector<float> y(gate.size());
  backend->silu_mul({gate.data(), up.data(), y.data(), 6});
  EXPECT_TRUE(y[0] == 0 && !std::signbit(y[0]));
  EXPECT_TRUE(y[1] == 0 && std::signbit(y[1]));
  EXPECT_TRUE(std::isnan(y[2]));
  EXPECT_EQ(y[3], kInfinity);
  EXPECT_TRUE(y[4] == 0 && std::signbit(y[4]));
  EXPECT_TRUE(std::isnan(y[5]));
}

INSTANTIATE_TEST_SUITE_P(All, ModelParity, ::testing::ValuesIn(isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace twilight::test
