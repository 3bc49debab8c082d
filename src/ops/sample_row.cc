#include "ops/sample_row.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace twilight {

std::int32_t sample_row(std::span<const float> logits, const RowDraw& draw, SampleOrder& order) {
  float top = -std::numeric_limits<float>::infinity();
  bool ordered = true;
  for (const float x : logits) {
    ordered = ordered && !std::isnan(x);
    top = std::max(top, x);
  }
  if (!ordered || !std::isfinite(top)) return -1;
  if (draw.temperature == 0) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) -
                                     logits.begin());
  }
  order.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    order.emplace_back(logits[i], static_cast<std::int32_t>(i));
  }
  const std::size_t keep =
      draw.top_k > 0 ? std::min(order.size(), static_cast<std::size_t>(draw.top_k)) : order.size();
  const auto heavier = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(keep), order.end(),
                    heavier);
  order.resize(keep);

  const auto weight = [&](float logit) {
    return std::exp(static_cast<double>(logit - order.front().first) / draw.temperature);
  };
  double total = 0;
  for (const auto& [logit, id] : order) total += weight(logit);
  double nucleus = 0;
  std::size_t count = 0;
  while (count < order.size() && nucleus < draw.top_p * total) {
    nucleus += weight(order[count++].first);
  }
  const double target = draw.uniform * nucleus;
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    sum += weight(order[i].first);
    if (target < sum) return order[i].second;
  }
  return order[count - 1].second;
}

}  // namespace twilight
