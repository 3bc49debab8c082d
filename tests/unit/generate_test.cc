#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "support/engine_runs.h"
#include "support/expect_error.h"

/// The sampler and the generation loop.
namespace twilight::test {
namespace {

TEST(Sampler, GreedyTakesTheLowestIdOfTheLargest) {
  Sampler sampler({});
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 3, 2, 3, 3}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-5}), 0);
  EXPECT_EQ(sampler.sample(std::vector<float>(10, 0.0F)), 0);
}

TEST(Sampler, NarrowChoicesAreGreedy) {
  const std::vector<float> logits = {0.5F, 2.0F, 1.9F, 2.0F, -1.0F};
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Sampler one({.temperature = 1, .top_k = 1, .seed = seed});
    Sampler tiny({.temperature = 1, .top_p = 1e-9, .seed = seed});
    Sampler cold({.temperature = 1e-4, .top_k = 3, .top_p = 0.4, .seed = seed});
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(one.sample(logits), 1);
      EXPECT_EQ(tiny.sample(logits), 1);
      EXPECT_EQ(cold.sample(logits), 1);
    }
  }
}

TEST(Sampler, SeedsRepeat) {
  std::vector<float> logits(50);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 7);
  const auto draw = [&](std::uint64_t seed) {
    Sampler sampler({.temperature = 1, .seed = seed});
    std::vector<std::int32_t> ids;
    ids.reserve(40);
    for (int i = 0; i < 40; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  EXPECT_EQ(draw(7), draw(7));
  EXPECT_NE(draw(7), draw(8));
}

// Chi-square of 20,000 draws against softmax(logits / T), cut to the nucleus. With at most 11
// degrees of freedom a value above 45 has a chance below 1e-5; the seed is fixed.
TEST(Sampler, DrawsFollowTheDistribution) {
  std::vector<float> logits(12);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(i * 5 % 12) * 0.3F;
  }
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = 1, .seed = 1},
        SamplingOptions{.temperature = 2.5, .seed = 2},
        SamplingOptions{.temperature = 1, .top_k = 5, .seed = 3},
        SamplingOptions{.temperature = 0.7, .top_p = 0.8, .seed = 4}}) {
    std::vector<std::pair<double, std::size_t>> sorted;
    double total = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      sorted.emplace_back(std::exp(double{logits[i]} / options.temperature), i);
    }
    std::sort(sorted.rbegin(), sorted.rend());
    if (options.top_k > 0) sorted.resize(static_cast<std::size_t>(options.top_k));
    for (const auto& [weight, id] : sorted) total += weight;
    double nucleus = 0;
    std::map<std::int32_t, double> expected;
    for (const auto& [weight, id] : sorted) {
      if (nucleus >= options.top_p * total) break;
      nucleus += weight;
      expected[static_cast<std::int32_t>(id)] = weight;
    }
    constexpr int kDraws = 20000;
    std::map<std::int32_t, int> seen;
    Sampler sampler(options);
    for (int i = 0; i < kDraws; ++i) ++seen[sampler.sample(logits)];
    double chi_square = 0;
    for (const auto& [id, weight] : expected) {
      const double wanted = kDraws * weight / nucleus;
      chi_square += (seen[id] - wanted) * (seen[id] - wanted) / wanted;
    }
    EXPECT_EQ(seen.size(), expected.size());
    EXPECT_LT(chi_square, 45) << "temperature " << options.temperature;
    EXPECT_GT(chi_square, 0);
  }
}

TEST(Sampler, BadOptionsNameTheField) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const auto refused = [](const char* field, const SamplingOptions& options) {
    expect_error(ErrorCode::kInvalidArgument, {"[sampler]", field, "got ", "accepted "},
                 [&] { Sampler sampler(options); });
  };
  for (const double bad : {-1.0, kNan, kInf}) refused("temperature", {.temperature = bad});
  refused("top_k", {.top_k = -1});
  for (const double bad : {0.0, -0.5, 1.5, kNan}) refused("top_p", {.top_p = bad});
  Sampler sampler({});
  expect_error(ErrorCode::kInvalidArgument, {"[sampler]", "logits"},
               [&] { (void)sampler.sample({}); });
}

// Logits that make greedy choose `token`.
Logits forced(std::int32_t token) {
  Logits logits(static_cast<std::size_t>(vesper().info().vocab_size));
  logits[static_cast<std::size_t>(token)] = 1;
  return logits;
}

TEST(Generate, CountsTokens) {
  Engine engine(cpu(), vesper(), options_of(sparse_policy(), 128));
  Sequence sequence = engine.cache().new_sequence();
  const Logits logits = prefill(engine, sequence, some_tokens(40));
  for (const std::int32_t max_tokens : {0, 1, 7}) {
    Sequence fork = sequence.fork();
    GenerateOptions options;
    options.max_tokens = max_tokens;
    options.stop_at_eos = false;
    std::vector<std::int32_t> streamed;
    int steps = 0;
    options.on_token = [&](std::int32_t token) {
      streamed.push_back(token);
      return true;
    };
    options.on_step = [&] { ++steps; };
    const GenerateResult result = generate(engine, fork, logits, options);
    EXPECT_EQ(result.tokens.size(), static_cast<std::size_t>(max_tokens));
    EXPECT_EQ(result.tokens, streamed);
    EXPECT_EQ(result.reason, FinishReason::kLength);
    EXPECT_EQ(result.decode_steps, std::max(0, max_tokens - 1));
    EXPECT_EQ(steps, result.decode_steps);
    // The last token is not in the cache yet: nobody asked what follows it.
    EXPECT_EQ(fork.num_tokens(), 40 + result.decode_steps);
  }
  expect_error(ErrorCode::kInvalidArgument, {"max_tokens", "got -1"}, [&] {
    GenerateOptions options;
    options.max_tokens = -1;
    (void)generate(engine, sequence, logits, options);
  });
}

// The engine draws what a sampler of the same seed draws from the logits.
TEST(Generate, DrawsTheTokensOfTheSampler) {
  Engine engine(cpu(), vesper(), options_of(sparse_policy(), 128));
  Sequence sequence = engine.cache().new_sequence();
  const Logits first = prefill(engine, sequence, some_tokens(40));
  for (const SamplingOptions& sampling :
       {SamplingOptions{}, SamplingOptions{.temperature = 1, .seed = 3},
        SamplingOptions{.temperature = 0.7, .top_k = 50, .top_p = 0.9, .seed = 4}}) {
    Sequence fork = sequence.fork();
    GenerateOptions options;
    options.max_tokens = 16;
    options.stop_at_eos = false;
    options.sampling = sampling;
    const GenerateResult result = generate(engine, fork, first, options);
    Sequence other = sequence.fork();
    Sampler sampler(sampling);
    Logits logits = first;
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < 16; ++i) {
      tokens.push_back(sampler.sample(logits));
      logits = decode(engine, other, tokens.back());
    }
    EXPECT_EQ(result.tokens, tokens) << "temperature " << sampling.temperature;
  }
}

TEST(Generate, StopsAtTheEndToken) {
  ASSERT_FALSE(vesper().info().eos_tokens.empty());
  const std::int32_t eos = vesper().info().eos_tokens.front();
  Engine engine(cpu(), vesper(), options_of(sparse_policy(), 128));
  Sequence sequence = engine.cache().new_sequence();
  prefill(engine, sequence, some_tokens(10));
  GenerateOptions options;
  options.max_tokens = 3;
  const GenerateResult stopped = generate(engine, sequence, forced(eos), options);
  EXPECT_EQ(stopped.reason, FinishReason::kStop);
  EXPECT_TRUE(stopped.tokens.empty());
  options.stop_at_eos = false;
  const GenerateResult ignored = generate(engine, sequence, forced(eos), options);
  EXPECT_EQ(ignored.reason, FinishReason::kLength);
  ASSERT_EQ(ignored.tokens.size(), 3U);
  EXPECT_EQ(ignored.tokens.front(), eos);
}

TEST(Generate, StopsWhenTold) {
  Engine engine(cpu(), vesper(), options_of(sparse_policy(), 128));
  Sequence sequence = engine.cache().new_sequence();
  const Logits logits = prefill(engine, sequence, some_tokens(10));
  GenerateOptions options;
  options.stop_at_eos = false;
  int calls = 0;
  options.on_token = [&](std::int32_t) { return ++calls < 3; };
  const GenerateResult result = generate(engine, sequence, logits, options);
  EXPECT_EQ(result.reason, FinishReason::kCancelled);
  EXPECT_EQ(result.tokens.size(), 3U);
  EXPECT_EQ(sequence.num_tokens(), 12);
}

TEST(Generate, EndsWithTheContext) {
  Engine engine(cpu(), vesper(), options_of(sparse_policy(), 48));
  Sequence sequence = engine.cache().new_sequence();
  const Logits logits = prefill(engine, sequence, some_tokens(45));
  GenerateOptions options;
  options.max_tokens = 100;
  options.stop_at_eos = false;
  const GenerateResult result = generate(engine, sequence, logits, options);
  EXPECT_EQ(result.reason, FinishReason::kLength);
  EXPECT_EQ(sequence.num_tokens(), 48);
  EXPECT_EQ(result.tokens.size(), 4U);  // three that went into the cache, one more after them
}

TEST(Generate, EndsWithThePages) {
  EngineOptions engine_options = options_of(sparse_policy(), 128);
  engine_options.cache_tokens = 48;  // four pages
  Engine engine(cpu(), vesper(), engine_options);
  Sequence sequence = engine.cache().new_sequence();
  const Logits logits = prefill(engine, sequence, some_tokens(60));
  GenerateOptions options;
  options.stop_at_eos = false;
  const GenerateResult result = generate(engine, sequence, logits, options);
  EXPECT_EQ(result.reason, FinishReason::kOutOfPages);
  EXPECT_EQ(sequence.num_tokens(), 64);
  EXPECT_EQ(result.tokens.size(), 5U);
}

TEST(Generate, ReasonsHaveNames) {
  EXPECT_EQ(finish_reason_name(FinishReason::kStop), "stop");
  EXPECT_EQ(finish_reason_name(FinishReason::kLength), "length");
  EXPECT_EQ(finish_reason_name(FinishReason::kCancelled), "cancelled");
  EXPECT_EQ(finish_reason_name(FinishReason::kOutOfPages), "out of pages");
}

}  // namespace
}  // namespace twilight::test
