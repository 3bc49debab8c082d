#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/splitmix64.h"
#include "twilight/engine.h"

namespace twilight {
namespace {

std::uint64_t next(std::uint64_t& state) {
  state += kSplitMixStep;
  return splitmix64(state);
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
  require(std::isfinite(options.temperature) && options.temperature >= 0, "sampler",
          "temperature, got ", options.temperature, ", accepted 0 or more");
  require(options.top_k >= 0, "sampler", "top_k, got ", options.top_k, ", accepted 0 or more");
  require(options.top_p > 0 && options.top_p <= 1, "sampler", "top_p, got ", options.top_p,
          ", accepted above 0 to 1");
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  require(!logits.empty(), "sampler", "number of logits, got 0, accepted 1 or more");
  float top = -std::numeric_limits<float>::infinity();
  bool ordered = true;
  for (const float x : logits) {
    ordered = ordered && !std::isnan(x);
    top = std::max(top, x);
  }
  require(ordered && std::isfinite(top), "sampler",
          "logits, got NaN or no finite maximum, accepted numbers");
  if (options_.temperature == 0) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) -
                                     logits.begin());
  }
  sorted_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    sorted_.emplace_back(logits[i], static_cast<std::int32_t>(i));
  }
  const std::size_t keep = options_.top_k > 0
                               ? std::min(sorted_.size(), static_cast<std::size_t>(options_.top_k))
                               : sorted_.size();
  const auto heavier = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  std::partial_sort(sorted_.begin(), sorted_.begin() + static_cast<std::ptrdiff_t>(keep),
                    sorted_.end(), heavier);
  sorted_.resize(keep);

  const auto weight = [&](float logit) {
    return std::exp(static_cast<double>(logit - sorted_.front().first) / options_.temperature);
  };
  double total = 0;
  for (const auto& [logit, id] : sorted_) total += weight(logit);
  double nucleus = 0;
  std::size_t count = 0;
  while (count < sorted_.size() && nucleus < options_.top_p * total) {
    nucleus += weight(sorted_[count++].first);
  }
  const double target = static_cast<double>(next(state_) >> 11) * 0x1p-53 * nucleus;
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    sum += weight(sorted_[i].first);
    if (target < sum) return sorted_[i].second;
  }
  return sorted_[count - 1].second;
}

}  // namespace twilight
