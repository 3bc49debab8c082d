#include "server/token_choice.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace twilight::server {

TokenLogprobs logprobs_of(std::span<const float> logits, std::int32_t token, std::int32_t count) {
  const double top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  const double norm = top + std::log(sum);
  const auto logprob = [&](std::int32_t id) {
    return static_cast<float>(static_cast<double>(logits[static_cast<std::size_t>(id)]) - norm);
  };
  TokenLogprobs result;
  result.token = token;
  result.logprob = logprob(token);
  if (count <= 0) return result;
  std::vector<std::int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto best = ids.begin() + std::min<std::ptrdiff_t>(count, std::ssize(ids));
  std::partial_sort(ids.begin(), best, ids.end(), [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)];
    const float y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (auto it = ids.begin(); it != best; ++it) result.top.emplace_back(*it, logprob(*it));
  return result;
}

std::int32_t TokenChoice::sample(std::span<const float> logits) {
  if (bias_.empty()) return sampler_.sample(logits);
  biased_.assign(logits.begin(), logits.end());
  for (const auto& [token, value] : bias_) biased_[static_cast<std::size_t>(token)] += value;
  return sampler_.sample(biased_);
}

}  // namespace twilight::server
