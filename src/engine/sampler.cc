#include "engine/sampler_impl.h"

#include <cmath>

#include "core/check.h"
#include "core/splitmix64.h"

namespace twilight {
namespace {

std::uint64_t next(std::uint64_t& state) {
  state += kSplitMixStep;
  return splitmix64(state);
}

}  // namespace

void check_draw(const TokenDraw& draw) {
  require(std::isfinite(draw.temperature) && draw.temperature >= 0, "sampler", "temperature, got ",
          draw.temperature, ", accepted 0 or more");
  require(draw.top_k >= 0, "sampler", "top_k, got ", draw.top_k, ", accepted 0 or more");
  require(draw.top_p > 0 && draw.top_p <= 1, "sampler", "top_p, got ", draw.top_p,
          ", accepted above 0 to 1");
  require(draw.uniform >= 0 && draw.uniform < 1, "sampler", "uniform, got ", draw.uniform,
          ", accepted 0 to below 1");
}

void check_drawn(std::int32_t token) {
  require(token >= 0, "sampler", "logits, got NaN or no finite maximum, accepted numbers");
}

RowDraw row_draw_of(const TokenDraw& draw) {
  return {draw.temperature, draw.top_p, draw.uniform, draw.top_k};
}

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
  check_draw({options.temperature, options.top_k, options.top_p, 0});
}

TokenDraw Sampler::draw() {
  TokenDraw draw{options_.temperature, options_.top_k, options_.top_p, 0};
  // Greedy choices take no random number.
  if (draw.temperature != 0) draw.uniform = static_cast<double>(next(state_) >> 11) * 0x1p-53;
  return draw;
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  require(!logits.empty(), "sampler", "number of logits, got 0, accepted 1 or more");
  const std::int32_t token = sample_row(logits, row_draw_of(draw()), sorted_);
  check_drawn(token);
  return token;
}

}  // namespace twilight
