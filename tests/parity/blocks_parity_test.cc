#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/blocks.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "support/linear_check.h"
#include "support/random.h"
#include "support/same_bits.h"

/// Products with quantised blocks of every type on every instruction set of this machine against
/// the scalar reference.
namespace twilight::test {
namespace {

constexpr double kUlp = 0x1p-24;  // half a unit in the last place of f32, relative

// Where a type's blocks hold what: f16 fields, and the bytes of the codes.
struct Layout {
  WeightType type;
  std::vector<int> halves;
  int codes_begin, codes_end;
};

const std::vector<Layout>& layouts() {
  static const std::vector<Layout> kLayouts = {
      {WeightType::kQ4_0, {0}, 2, 18},      {WeightType::kQ4_1, {0, 2}, 4, 20},
      {WeightType::kQ5_0, {0}, 2, 22},      {WeightType::kQ5_1, {0, 2}, 4, 24},
      {WeightType::kQ8_0, {0}, 2, 34},      {WeightType::kQ2_K, {80, 82}, 16, 80},
      {WeightType::kQ3_K, {108}, 0, 96},    {WeightType::kQ4_K, {0, 2}, 16, 144},
      {WeightType::kQ5_K, {0, 2}, 16, 176}, {WeightType::kQ6_K, {208}, 0, 192}};
  return kLayouts;
}

// How the f16 fields and the activations are drawn.
enum class Values { kOrdinary, kZeroSteps, kLargestSteps, kSmallestSteps, kMixedInputs };

struct Case {
  Layout layout;
  std::int32_t m;
  std::int64_t rows, cols;
  Values values;
  bool bias, accumulate, full_precision, row_invariant;
  std::int64_t pad;     // floats between the rows of x (NaN) and of y
  std::int64_t offset;  // bytes that push the blocks off their alignment
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << weight_type_name(c.layout.type) << " m " << c.m << " rows " << c.rows << " cols "
             << c.cols << " values " << static_cast<int>(c.values) << (c.bias ? " bias" : "")
             << (c.accumulate ? " accumulate" : "") << (c.full_precision ? " full" : "")
             << (c.row_invariant ? " invariant" : "") << " pad " << c.pad << " offset " << c.offset;
}

// Every byte random, the f16 fields finite.
std::vector<std::byte> random_blocks(const Layout& layout, std::int64_t count, Values values,
                                     std::uint64_t seed) {
  Random random(seed);
  const int size = weight_block_bytes(layout.type);
  std::vector<std::byte> out(static_cast<std::size_t>(count * size));
  for (auto& byte : out) byte = static_cast<std::byte>(random.next() & 0xff);
  for (std::int64_t block = 0; block < count; ++block) {
    for (const int at : layout.halves) {
      std::uint16_t bits = f32_to_f16(0.05F * random.normal());
      const auto sign = static_cast<std::uint16_t>((random.next() & 1) << 15);
      if (values == Values::kZeroSteps && block % 3 != 1) bits = sign;
      if (values == Values::kLargestSteps && block % 2 == 0) bits = 0x7bff | sign;
      if (values == Values::kSmallestSteps) bits = static_cast<std::uint16_t>(block % 5) | sign;
      std::memcpy(out.data() + block * size + at, &bits, sizeof(bits));
    }
  }
  return out;
}

// Operands of one product, and what a result may be off by.
class Problem {
 public:
  explicit Problem(const Case& shape)
      : c(shape),
        bias_(normals(3, c.rows)),
        before_(normals(4, c.m * (c.rows + c.pad))),
        weights_(static_cast<std::size_t>(c.rows * c.cols)),
        offsets_(weights_.size()) {
    const WeightType type = c.layout.type;
    const std::int64_t count = c.rows * c.cols / weight_block_length(type);
    std::vector<std::byte> blocks = random_blocks(c.layout, count, c.values, 5);
    stored_.resize(blocks.size() + static_cast<std::size_t>(c.offset));
    std::memcpy(stored_.data() + c.offset, blocks.data(), blocks.size());
    dequantise_row(type, blocks.data(), weights_);
    if (type != WeightType::kQ8_0) {  // what a weight of code 0 is: the offset of its run
      for (std::int64_t block = 0; block < count; ++block) {
        std::memset(blocks.data() + block * weight_block_bytes(type) + c.layout.codes_begin, 0,
                    static_cast<std::size_t>(c.layout.codes_end - c.layout.codes_begin));
      }
      dequantise_row(type, blocks.data(), offsets_);
    }
    const std::vector<float> dense = normals(6, std::int64_t{c.m} * c.cols);
    x_.assign(static_cast<std::size_t>(c.m * (c.cols + c.pad)),
              std::numeric_limits<float>::quiet_NaN());
    for (std::int64_t i = 0; i < c.m * c.cols; ++i) {
      float value = dense[static_cast<std::size_t>(i)];
      if (c.values == Values::kMixedInputs) {
        constexpr float kFactors[] = {0.0F, 1.0F, 1e-36F, 1e12F, 1e-12F, -1.0F};
        value *= kFactors[i / 32 % 6];
      }
      x_[static_cast<std::size_t>(i / c.cols * (c.cols + c.pad) + i % c.cols)] = value;
    }
  }

  [[nodiscard]] std::vector<float> run(Backend& backend) const {
    std::vector<float> y = before_;
    LinearParams params;
    params.x = x_.data();
    params.x_stride = c.cols + c.pad;
    params.num_rows = c.m;
    params.weight = {stored_.data() + c.offset, DType::kF32, c.rows, c.cols, c.layout.type};
    params.bias = c.bias ? bias_.data() : nullptr;
    params.y = y.data();
    params.y_stride = c.rows + c.pad;
    params.accumulate = c.accumulate;
    params.row_invariant = c.row_invariant;
    params.full_precision = c.full_precision;
    backend.linear(params);
    return y;
  }

  // Rounding to bytes moves x by half a step: max |x| of its 32, over 254 (docs/numerics.md), with
  // 2^-14 for the rounding of step and quotient, or takes all of an x below 2^-100. The rest is
  // f32: with S = sum (|w| + 2 |offset|) max |x| + |bias| + |y|, a term takes part in at most cols
  // / 8 + 16 roundings.
  void check_bytes(const std::vector<float>& actual, const std::vector<float>& expected) const {
    const std::int64_t roundings = c.cols / 8 + 16;
    double squares = 0;  // of errors in units of the expected one
    std::int64_t count = 0;
    for (std::int64_t m = 0; m < c.m; ++m) {
      for (std::int64_t row = 0; row < c.rows + c.pad; ++row) {
        const auto at = static_cast<std::size_t>(m * (c.rows + c.pad) + row);
        if (row >= c.rows) {
          ASSERT_EQ(actual[at], before_[at]) << c << ": wrote behind row " << m;
          continue;
        }
        double rounding = 0;
        double variance = 0;
        double size = c.bias ? std::abs(bias_[static_cast<std::size_t>(row)]) : 0;
        if (c.accumulate) size += std::abs(before_[at]);
        for (std::int64_t i = 0; i < c.cols; i += 32) {
          double largest = 0;
          for (std::int64_t j = i; j < i + 32; ++j) {
            largest = std::max(largest, std::abs(double{x(m, j)}));
          }
          const double off = largest < 0x1p-100 ? largest : largest / 254 * (1 + 0x1p-14);
          for (std::int64_t j = i; j < i + 32; ++j) {
            const auto w = static_cast<std::size_t>(row * c.cols + j);
            rounding += std::abs(double{weights_[w]}) * off;
            variance += std::pow(double{weights_[w]} * largest / 127, 2) / 12;
            size += (std::abs(double{weights_[w]}) + 2 * std::abs(double{offsets_[w]})) * largest;
          }
        }
        const double f32 = static_cast<double>(roundings) * kUlp * size;
        ASSERT_NEAR(actual[at], expected[at], rounding + f32) << c << " at " << m << ", " << row;
        if (variance > 0) {
          const double error = std::max(0.0, std::abs(double{actual[at]} - expected[at]) - f32);
          squares += error * error / variance;
          ++count;
        }
      }
    }
    // Errors of rounding are as good as independent, so a wrong sum within the bound shows here.
    if (c.values == Values::kOrdinary && count >= 64) {
      EXPECT_LT(std::sqrt(squares / static_cast<double>(count)), 1.4) << c;
    }
  }

  // As for other weights: f32 sums, and operands rounded to bf16 where that is allowed.
  void check_wide(const std::vector<float>& actual, const std::vector<float>& expected,
                  bool may_use_bf16) const {
    const double rounding = may_use_bf16 ? 0x1p-8 + 0x1p-18 : 0.0;
    check_products({c.m, c.rows, c.cols, c.pad, x_, weights_, c.bias ? &bias_ : nullptr, before_,
                    c.accumulate},
                   actual, expected, rounding, c);
  }

  Case c;

 private:
  [[nodiscard]] float x(std::int64_t m, std::int64_t i) const {
    return x_[static_cast<std::size_t>(m * (c.cols + c.pad) + i)];
  }

  std::vector<float> bias_, before_, weights_, offsets_, x_;
  std::vector<std::byte> stored_;
};

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

class BlocksParity : public ::testing::TestWithParam<std::string> {
 protected:
  // Runs the product with 1, 2 and 5 threads; expects the same bits and returns them.
  std::vector<float> run(const Problem& problem) const {
    std::vector<float> first;
    for (const int threads : {1, 2, 5}) {
      ThreadPool pool(threads);
      std::vector<float> out = problem.run(*make_cpu_backend(pool, GetParam()));
      if (threads == 1) {
        first = std::move(out);
      } else {
        EXPECT_TRUE(same_bits(first, out)) << problem.c << ' ' << threads << " threads";
      }
    }
    return first;
  }

  const std::unique_ptr<Backend> ref_ = make_ref_backend();
};

TEST_P(BlocksParity, EveryTypeBatchAndShape) {
  constexpr std::int64_t kRows[] = {1, 3, 67, 32, 131};
  constexpr std::int64_t kBlocks[] = {1, 2, 3, 5, 18, 7};
  std::int64_t i = 0;
  for (const Layout& layout : layouts()) {
    for (std::int32_t m = 1; m <= 17; ++m) {
      ++i;
      const int length = weight_block_length(layout.type);
      const Problem problem({.layout = layout,
                             .m = m,
                             .rows = kRows[i % 5],
                             .cols = length * (length == 32 ? kBlocks[i % 6] : i % 3 + 1),
                             .values = Values::kOrdinary,
                             .bias = i % 2 == 0,
                             .accumulate = i % 3 == 0,
                             .full_precision = false,
                             .row_invariant = m > cpu::kBlockMatvecMaxRows,
                             .pad = i % 4,
                             .offset = i % 3});
      problem.check_bytes(run(problem), problem.run(*ref_));
    }
  }
}

TEST_P(BlocksParity, HostileStepsAndInputs) {
  for (const Layout& layout : layouts()) {
    for (const Values values : {Values::kZeroSteps, Values::kLargestSteps, Values::kSmallestSteps,
                                Values::kMixedInputs}) {
      for (const std::int32_t m : {1, 7}) {
        const Problem problem({layout, m, 21, 768, values, false, false, false, true, 0, 1});
        problem.check_bytes(run(problem), problem.run(*ref_));
      }
    }
  }
}

TEST_P(BlocksParity, FullPrecisionAndManyRows) {
  const bool bf16 = GetParam() == "avx512_bf16";
  for (const Layout& layout : layouts()) {
    for (const std::int32_t m : {1, 3, 16, 17, 45}) {
      for (const bool full : {false, true}) {
        if (m <= cpu::kBlockMatvecMaxRows && !full) continue;
        const Problem problem({layout, m, 69, 768, Values::kOrdinary, m % 2 == 1, m % 3 == 0, full,
                               m == 3, m % 4, 1});
        problem.check_wide(run(problem), problem.run(*ref_), bf16 && !full);
      }
    }
  }
}

// A row's result does not depend on the rows beside it, so a sequence decodes the same alone.
TEST_P(BlocksParity, RowsDoNotDependOnTheBatch) {
  constexpr std::int64_t kRows = 37;
  constexpr std::int64_t kCols = 768;
  ThreadPool pool(2);
  const auto backend = make_cpu_backend(pool, GetParam());
  const std::vector<float> x = normals(2, 19 * kCols);
  for (const Layout& layout : layouts()) {
    const auto blocks = random_blocks(layout, kRows * kCols / weight_block_length(layout.type),
                                      Values::kOrdinary, 1);
    for (const bool full : {false, true}) {
      const auto product = [&](std::int32_t first, std::int32_t count) {
        std::vector<float> y(static_cast<std::size_t>(count * kRows));
        LinearParams params;
        params.x = x.data() + first * kCols;
        params.x_stride = kCols;
        params.num_rows = count;
        params.weight = {blocks.data(), DType::kF32, kRows, kCols, layout.type};
        params.y = y.data();
        params.y_stride = kRows;
        params.row_invariant = true;
        params.full_precision = full;
        backend->linear(params);
        return y;
      };
      std::vector<float> one_by_one;
      for (std::int32_t m = 0; m < 19; ++m) {
        for (const float value : product(m, 1)) one_by_one.push_back(value);
        EXPECT_TRUE(same_bits(product(0, m + 1), one_by_one))
            << weight_type_name(layout.type) << ' ' << m + 1 << " rows";
      }
    }
  }
}

TEST_P(BlocksParity, InputsThatAreNotFinite) {
  constexpr std::int64_t kRows = 5;
  constexpr std::int64_t kCols = 512;
  ThreadPool pool(1);
  const auto backend = make_cpu_backend(pool, GetParam());
  for (const Layout& layout : layouts()) {
    const auto blocks = random_blocks(layout, kRows * kCols / weight_block_length(layout.type),
                                      Values::kOrdinary, 1);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      std::vector<float> x = normals(2, 3 * kCols);
      x[kCols + 100] = bad;
      std::vector<float> y(3 * kRows);
      LinearParams params;
      params.x = x.data();
      params.x_stride = kCols;
      params.num_rows = 3;
      params.weight = {blocks.data(), DType::kF32, kRows, kCols, layout.type};
      params.y = y.data();
      params.y_stride = kRows;
      backend->linear(params);
      for (std::size_t i = 0; i < y.size(); ++i) {
        EXPECT_EQ(std::isnan(y[i]), i / kRows == 1) << weight_type_name(layout.type) << ' ' << i;
      }
    }
  }
}

// The steps' products are exact and each weight rounds once, so every set gives the same numbers.
TEST_P(BlocksParity, WeightsInF32AreThoseOfTheReference) {
  const cpu::BlockKernels& kernels = cpu::block_kernels(cpu::parse_isa(GetParam()));
  for (const Layout& layout : layouts()) {
    for (const Values values :
         {Values::kOrdinary, Values::kZeroSteps, Values::kLargestSteps, Values::kSmallestSteps}) {
      constexpr std::int64_t kCount = 33;
      const auto blocks = random_blocks(layout, kCount, values, 9);
      std::vector<std::byte> shifted(blocks.size() + 1);
      std::memcpy(shifted.data() + 1, blocks.data(), blocks.size());
      const auto weights = static_cast<std::size_t>(kCount * weight_block_length(layout.type));
      std::vector<float> expected(weights);
      std::vector<float> actual(weights + 1, 42.0F);
      dequantise_row(layout.type, blocks.data(), expected);
      kernels.dequantise(layout.type, shifted.data() + 1, static_cast<std::int64_t>(weights),
                         actual.data());
      for (std::size_t i = 0; i < weights; ++i) {
        ASSERT_EQ(actual[i], expected[i]) << weight_type_name(layout.type) << " weight " << i;
      }
      EXPECT_EQ(actual[weights], 42.0F);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, BlocksParity, ::testing::ValuesIn(isas()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace twilight::test
