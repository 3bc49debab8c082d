#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "core/thread_pool.h"
#include "ops/backend.h"
#include "support/expect_error.h"
#include "support/sampling_cases.h"

/// Tokens drawn from rows of logits on host memory: the definition, and by hand.
namespace twilight::test {
namespace {

class SampleRows : public ::testing::TestWithParam<std::int64_t> {};

// Sums of f64 in order are 2^-53 a term off, far less than 1e-9 for any vocabulary.
TEST_P(SampleRows, FollowTheDefinition) {
  ThreadPool pool(2);
  const std::unique_ptr<Backend> ref = make_ref_backend();
  const std::unique_ptr<Backend> cpu = make_cpu_backend(pool, "auto");
  for (const SamplingCase& c : sampling_cases(GetParam())) {
    SCOPED_TRACE(c.name);
    const SamplingOracle oracle(c.logits);
    const std::vector<float> x = c.rows();
    const auto run = [&](Backend& backend) {
      std::vector<std::int32_t> out(c.draws.size(), 42);
      backend.sample_rows(
          {x.data(), static_cast<std::int32_t>(out.size()), c.cols, c.draws.data(), out.data()});
      return out;
    };
    const std::vector<std::int32_t> got = run(*ref);
    EXPECT_EQ(run(*cpu), got);
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_TRUE(oracle.allows(c.draws[i], got[i], 1e-9))
          << got[i] << ": " << describe(c.draws[i]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, SampleRows, ::testing::ValuesIn(sampling_vocabularies()));

std::int32_t one(const std::vector<float>& x, const RowDraw& draw) {
  std::int32_t token = 42;
  make_ref_backend()->sample_rows(
      {x.data(), 1, static_cast<std::int64_t>(x.size()), &draw, &token});
  return token;
}

// Weights 1, 2, 4, 8, of which the order is 8 (3), 4 (0), 2 (2), 1 (1).
TEST(SampleRowsByHand, Boundaries) {
  const auto ln = [](double x) { return static_cast<float>(std::log(x)); };
  const std::vector<float> x = {ln(4), ln(1), ln(2), ln(8)};
  EXPECT_EQ(one(x, {1, 1, 0, 0}), 3);
  EXPECT_EQ(one(x, {1, 1, 8.0 / 15 - 1e-6, 0}), 3);
  EXPECT_EQ(one(x, {1, 1, 8.0 / 15 + 1e-6, 0}), 0);
  EXPECT_EQ(one(x, {1, 1, 12.0 / 15 + 1e-6, 0}), 2);
  EXPECT_EQ(one(x, {1, 1, 14.0 / 15 + 1e-6, 0}), 1);
  // The nucleus of 0.6 is 8 and 4; of their sum the first has two thirds.
  EXPECT_EQ(one(x, {1, 0.6, 2.0 / 3 - 1e-6, 0}), 3);
  EXPECT_EQ(one(x, {1, 0.6, 2.0 / 3 + 1e-6, 0}), 0);
  EXPECT_EQ(one(x, {1, 0.6, 0.999999, 0}), 0);
  // Of the first three, 8 + 4 hold 12 / 14.
  EXPECT_EQ(one(x, {1, 0.85, 0.999999, 3}), 0);
  EXPECT_EQ(one(x, {1, 0.86, 0.999999, 3}), 2);
  // Squared weights at half the temperature: 64 of 85.
  EXPECT_EQ(one(x, {0.5, 1, 64.0 / 85 - 1e-6, 0}), 3);
  EXPECT_EQ(one(x, {0.5, 1, 64.0 / 85 + 1e-6, 0}), 0);
  // Equal ones in order of their numbers.
  const std::vector<float> equal(4, 3.0F);
  for (const int i : {0, 1, 2, 3}) EXPECT_EQ(one(equal, {1, 1, 0.25 * i + 0.125, 0}), i);
  EXPECT_EQ(one(equal, {1, 0.5, 0.5, 0}), 1);
  EXPECT_EQ(one(equal, {1, 0.5, 0.999, 0}), 1);
}

TEST(SampleRowsByHand, RowsWithoutAToken) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const double temperature : {0.0, 1.0}) {
    const RowDraw draw{temperature, 1, 0.5, 0};
    EXPECT_EQ(one({1, std::nanf(""), 2}, draw), -1);
    EXPECT_EQ(one({1, kInf, 2}, draw), -1);
    EXPECT_EQ(one({-kInf, -kInf}, draw), -1);
    EXPECT_EQ(one({-kInf, -5}, draw), 1);
  }
}

TEST(SampleRowsByHand, BadFieldsAreNamed) {
  const std::unique_ptr<Backend> backend = make_ref_backend();
  const std::vector<float> x(4);
  const RowDraw draw;
  std::int32_t out = 0;
  const auto refused = [&](const char* field, const SampleRowsParams& params) {
    expect_error(ErrorCode::kInvalidArgument, {"[sample_rows]", field},
                 [&] { backend->sample_rows(params); });
  };
  refused("num_rows", {x.data(), -1, 4, &draw, &out});
  refused("cols", {x.data(), 1, 0, &draw, &out});
  refused("x", {nullptr, 1, 4, &draw, &out});
  refused("draws", {x.data(), 1, 4, nullptr, &out});
  refused("out", {x.data(), 1, 4, &draw, nullptr});
}

}  // namespace
}  // namespace twilight::test
