#ifndef TWILIGHT_TESTS_SUPPORT_ENGINE_RUNS_H_
#define TWILIGHT_TESTS_SUPPORT_ENGINE_RUNS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "support/random.h"
#include "support/same_bits.h"
#include "twilight/engine.h"

/// Short ways to run an engine in tests, on the bundled model unless told otherwise.
namespace twilight::test {

inline const std::string kRoot = TWILIGHT_SOURCE_DIR;

inline const Model& vesper() {
  static const Model kModel = Model::load(kRoot + "/models/vesper-19m");
  return kModel;
}

inline Device cpu(int threads = 2) {
  DeviceOptions options;
  options.threads = threads;
  return Device(options);
}

// Sparse from the first token on, small enough to prune at a few hundred tokens.
inline SparsePolicy sparse_policy(const std::string& preset = "paper") {
  SparsePolicy policy = make_policy(preset);
  policy.dense_layers = 0;
  policy.dense_below_tokens = 0;
  policy.min_candidates = std::min(policy.min_candidates, 64);
  policy.max_candidates = std::max(policy.max_candidates, policy.min_candidates);
  policy.min_tokens = 8;
  policy.sink_tokens = 4;
  policy.recent_pages = 1;
  return policy;
}

inline EngineOptions options_of(const SparsePolicy& policy, std::int32_t context = 512) {
  EngineOptions options;
  options.policy = policy;
  options.max_context = context;
  return options;
}

inline std::vector<std::int32_t> some_tokens(std::size_t count, std::uint64_t seed = 1,
                                             const Model& model = vesper()) {
  Random random(seed);
  std::vector<std::int32_t> tokens(count);
  for (std::int32_t& token : tokens) {
    token = static_cast<std::int32_t>(random.below(model.info().vocab_size));
  }
  return tokens;
}

using Logits = std::vector<float>;

inline double max_abs(const Logits& values) {
  double out = 0;
  for (const float value : values) out = std::max(out, std::abs(double{value}));
  return out;
}

inline double max_difference(const Logits& a, const Logits& b) {
  double out = 0;
  for (std::size_t i = 0; i < a.size(); ++i) out = std::max(out, std::abs(double{a[i]} - b[i]));
  return out;
}

inline Logits prefill(Engine& engine, Sequence& sequence, std::span<const std::int32_t> tokens) {
  Logits logits(static_cast<std::size_t>(engine.model().info().vocab_size));
  EXPECT_EQ(engine.prefill(sequence, tokens, logits), Engine::Status::kOk);
  return logits;
}

inline Logits decode(Engine& engine, Sequence& sequence, std::int32_t token) {
  Logits logits(static_cast<std::size_t>(engine.model().info().vocab_size));
  Sequence* const batch[] = {&sequence};
  EXPECT_EQ(engine.decode(batch, {&token, 1}, logits), Engine::Status::kOk);
  return logits;
}

inline Logits decode_all(Engine& engine, Sequence& sequence, std::span<const std::int32_t> tokens) {
  Logits logits;
  for (const std::int32_t token : tokens) logits = decode(engine, sequence, token);
  return logits;
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_ENGINE_RUNS_H_
