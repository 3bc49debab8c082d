#ifndef TWILIGHT_SERVER_TOKEN_CHOICE_H_
#define TWILIGHT_SERVER_TOKEN_CHOICE_H_

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "server/scheduler.h"

namespace twilight::server {

/// Log-probability of `token` under `logits` [vocab], and of the `count` likeliest tokens (ties to
/// the lower id).
[[nodiscard]] TokenLogprobs logprobs_of(std::span<const float> logits, std::int32_t token,
                                        std::int32_t count);

/// Draws a token after adding a request's biases. Log-probabilities are those of the model, without
/// them.
class TokenChoice {
 public:
  TokenChoice(const SamplingOptions& sampling,
              std::vector<std::pair<std::int32_t, float>> logit_bias)
      : sampler_(sampling), bias_(std::move(logit_bias)) {}
  [[nodiscard]] std::int32_t sample(std::span<const float> logits);
  /// Whether the choice needs no logits on the host; then `draw` is what `sample` would do.
  [[nodiscard]] bool draws_alone() const { return bias_.empty(); }
  [[nodiscard]] TokenDraw draw() { return sampler_.draw(); }

 private:
  Sampler sampler_;
  std::vector<std::pair<std::int32_t, float>> bias_;
  std::vector<float> biased_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_TOKEN_CHOICE_H_
