#include "backend/cpu/dnnl_matmul.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/float16.h"
#include "core/thread_pool.h"
#include "support/elements.h"

namespace twilight::cpu {
namespace {

struct Case {
  std::int32_t m;
  std::int64_t n, k;
  DType dtype;
  bool bias = false;
  bool accumulate = false;
  std::int64_t pad = 0;     // floats between rows of x and y, NaN in x
  std::int64_t offset = 0;  // bytes that push W off its alignment
};

std::string text(const Case& c) {
  return "m " + std::to_string(c.m) + " n " + std::to_string(c.n) + " k " + std::to_string(c.k) +
         " " + std::string(dtype_name(c.dtype)) + " bias " + std::to_string(c.bias) + " acc " +
         std::to_string(c.accumulate) + " pad " + std::to_string(c.pad) + " off " +
         std::to_string(c.offset);
}

// One problem: operands as f32 (W already rounded to its dtype) and y before the call.
struct Problem {
  explicit Problem(const Case& shape) : c(shape) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    x.assign(static_cast<std::size_t>(c.m * (c.k + c.pad)), nan);
    for (std::int64_t i = 0; i < c.m; ++i) {
      for (std::int64_t j = 0; j < c.k; ++j) {
        x[static_cast<std::size_t>(i * (c.k + c.pad) + j)] = normal(random);
      }
    }
    w.resize(static_cast<std::size_t>(c.n * c.k));
    const std::int64_t bytes = dtype_bytes(c.dtype);
    stored.resize(w.size() * static_cast<std::size_t>(bytes) + static_cast<std::size_t>(c.offset));
    for (std::size_t i = 0; i < w.size(); ++i) {
      w[i] = round_to(normal(random), c.dtype);
      store_element(stored.data() + c.offset + static_cast<std::int64_t>(i) * bytes, c.dtype, w[i]);
    }
    bias.resize(static_cast<std::size_t>(c.n));
    for (float& b : bias) b = normal(random);
    before.resize(static_cast<std::size_t>(c.m * (c.n + c.pad)));
    for (float& y : before) y = normal(random);
  }

  std::vector<float> run(DnnlMatmul& matmul, bool full_precision) const {
    std::vector<float> y = before;
    matmul.run({.x = x.data(),
                .x_stride = c.k + c.pad,
                .num_rows = c.m,
                .weight = {stored.data() + c.offset, c.dtype, c.n, c.k},
                .bias = c.bias ? bias.data() : nullptr,
                .y = y.data(),
                .y_stride = c.n + c.pad,
                .accumulate = c.accumulate,
                .full_precision = full_precision});
    return y;
  }

  // Against double over the operands as rounded to `compute`. What is left is f32 summation: with
  // S = sum |x w| + |bias| + |y|, at most (K + 3) roundings of 2^-24 on each term of S, plus one
  // rounding of the partial sums per addend: |error| <= (K + 3) 2^-24 S.
  void check(const std::vector<float>& y, DType compute) const {
    for (std::int64_t i = 0; i < c.m; ++i) {
      for (std::int64_t j = 0; j < c.n; ++j) {
        double sum = 0;
        double size = 0;
        for (std::int64_t l = 0; l < c.k; ++l) {
          const double a = round_to(x[static_cast<std::size_t>(i * (c.k + c.pad) + l)], compute);
          const double b = round_to(w[static_cast<std::size_t>(j * c.k + l)], compute);
          sum += a * b;
          size += std::abs(a * b);
        }
        const auto at = static_cast<std::size_t>(i * (c.n + c.pad) + j);
        if (c.bias) {
          sum += bias[static_cast<std::size_t>(j)];
          size += std::abs(bias[static_cast<std::size_t>(j)]);
        }
        if (c.accumulate) {
          sum += before[at];
          size += std::abs(before[at]);
        }
        const double tolerance = static_cast<double>(c.k + 3) * 0x1p-24 * size;
        ASSERT_NEAR(y[at], sum, tolerance) << text(c) << " row " << i << " column " << j;
      }
      for (std::int64_t j = c.n; j < c.n + c.pad; ++j) {
        const auto at = static_cast<std::size_t>(i * (c.n + c.pad) + j);
        ASSERT_EQ(y[at], before[at]) << text(c) << ": wrote between rows, row " << i;
      }
    }
  }

  Case c;
  std::vector<float> x, w, bias, before;
  std::vector<std::byte> stored;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF32}) {
    all.push_back({1, 1, 1, dtype});
    all.push_back({1, 130, 64, dtype, true});
    all.push_back({7, 65, 33, dtype, false, true, 3, 1});
    all.push_back({19, 64, 576, dtype, true, true, 5, 3});
    all.push_back({257, 63, 100, dtype, true, false, 1, 1});
    all.push_back({530, 129, 48, dtype, false, false, 0, 2});
  }
  all.push_back({2050, 3, 17, DType::kBf16, true, true, 2, 1});  // more rows than one block
  return all;
}

TEST(DnnlMatmul, MatchesDoubleOnEveryInstructionSet) {
  ThreadPool pool(2);
  for (const Isa isa : available_isas()) {
    DnnlMatmul matmul(pool, isa);
    SCOPED_TRACE(isa_name(isa));
    for (const Case& c : cases()) {
      const Problem problem(c);
      problem.check(problem.run(matmul, false), matmul.uses_bf16() ? DType::kBf16 : DType::kF32);
      problem.check(problem.run(matmul, true), DType::kF32);
    }
  }
}

TEST(DnnlMatmul, BitIdenticalForAnyNumberOfThreads) {
  for (const Case& c : cases()) {
    const Problem problem(c);
    for (const bool full_precision : {false, true}) {
      std::vector<float> one;
      for (const int threads : {1, 2, 3, 5}) {
        ThreadPool pool(threads);
        DnnlMatmul matmul(pool, parse_isa("auto"));
        const std::vector<float> y = problem.run(matmul, full_precision);
        if (threads == 1) one = y;
        ASSERT_EQ(std::memcmp(one.data(), y.data(), y.size() * sizeof(float)), 0)
            << text(c) << " threads " << threads;
      }
    }
  }
}

TEST(DnnlMatmul, RepeatedCallsAgreeAfterOtherShapes) {
  ThreadPool pool(2);
  DnnlMatmul matmul(pool, parse_isa("auto"));
  const Problem problem({37, 100, 96, DType::kF16, true, false, 0, 1});
  const std::vector<float> first = problem.run(matmul, false);
  // More shapes than the cache of a worker holds.
  for (std::int32_t m = 1; m <= 600; ++m) Problem({m, 1, 2, DType::kBf16}).run(matmul, false);
  EXPECT_EQ(first, problem.run(matmul, false));
}

TEST(DnnlMatmul, NonFiniteInputsReachTheOutput) {
  ThreadPool pool(1);
  for (const Isa isa : available_isas()) {
    DnnlMatmul matmul(pool, isa);
    Problem problem({17, 70, 40, DType::kF16});
    problem.x[3 * 40 + 5] = std::numeric_limits<float>::quiet_NaN();
    problem.x[4 * 40 + 39] = std::numeric_limits<float>::infinity();
    const std::vector<float> y = problem.run(matmul, false);
    for (std::size_t j = 0; j < 70; ++j) {
      EXPECT_TRUE(std::isnan(y[3 * 70 + j])) << isa_name(isa);
      EXPECT_FALSE(std::isfinite(y[4 * 70 + j])) << isa_name(isa);
      EXPECT_TRUE(std::isfinite(y[2 * 70 + j])) << isa_name(isa);
    }
  }
}

int threads_of_process() {
  int count = 0;
  for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    ++count;
  }
  return count;
}

TEST(DnnlMatmul, StartsNoThreadsOfItsOwn) {
  if (!std::filesystem::exists("/proc/self/task")) GTEST_SKIP() << "no /proc";
  const int callers_setting = omp_get_max_threads();
  omp_set_num_threads(4);
  ThreadPool pool(2);
  const int before = threads_of_process();
  DnnlMatmul matmul(pool, parse_isa("auto"));
  const Problem problem({300, 200, 512, DType::kBf16});
  (void)problem.run(matmul, false);
  (void)problem.run(matmul, true);
  EXPECT_EQ(threads_of_process(), before);
  EXPECT_EQ(omp_get_max_threads(), 4);
  omp_set_num_threads(callers_setting);
}

TEST(PrefillKernels, ConversionsMatchScalarForEveryHalf) {
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  const auto count = static_cast<std::int64_t>(halves.size()) - 5;  // a tail past the vectors
  std::vector<std::byte> in(halves.size() * 2 + 1);
  std::memcpy(in.data() + 1, halves.data(), halves.size() * 2);
  for (const Isa isa : available_isas()) {
    const PrefillKernels& kernels = prefill_kernels(isa);
    std::vector<float> f32(halves.size());
    std::vector<std::uint16_t> bf16(halves.size());
    for (const DType dtype : {DType::kF16, DType::kBf16}) {
      kernels.to_f32(in.data() + 1, dtype, count, f32.data());
      kernels.to_bf16(in.data() + 1, dtype, count, bf16.data());
      for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
        const float value = dtype == DType::kF16 ? f16_to_f32(halves[i]) : bf16_to_f32(halves[i]);
        if (std::isnan(value)) {
          ASSERT_TRUE(std::isnan(f32[i])) << isa_name(isa) << " " << i;
          ASSERT_TRUE(std::isnan(bf16_to_f32(bf16[i]))) << isa_name(isa) << " " << i;
        } else {
          ASSERT_EQ(f32[i], value) << isa_name(isa) << " " << i;
          ASSERT_EQ(bf16[i], f32_to_bf16(value)) << isa_name(isa) << " " << i;
        }
      }
    }
  }
}

TEST(PrefillKernels, F32ToBf16RoundsToNearestEven) {
  std::vector<float> values;
  for (const std::uint32_t top :
       {0x3f80U, 0x3f81U, 0x0000U, 0x0001U, 0x7f7fU, 0x7f80U, 0x7fffU, 0xbf80U, 0xff7fU, 0xffffU}) {
    for (const std::uint32_t low : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
      values.push_back(std::bit_cast<float>((top << 16) | low));
    }
  }
  for (const Isa isa : available_isas()) {
    std::vector<std::uint16_t> out(values.size());
    prefill_kernels(isa).to_bf16(reinterpret_cast<const std::byte*>(values.data()), DType::kF32,
                                 static_cast<std::int64_t>(values.size()), out.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(out[i], f32_to_bf16(values[i])) << isa_name(isa) << " value " << values[i];
    }
  }
}

}  // namespace
}  // namespace twilight::cpu
