#include "distribution.h"

#include <algorithm>
#include <numeric>

#include "table.h"

namespace twilight::app {

double quantile(std::span<const double> sorted, double share) {
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

Distribution::Distribution(std::vector<double> values) : count(values.size()) {
  if (values.empty()) return;
  std::sort(values.begin(), values.end());
  min = values.front();
  p10 = quantile(values, 0.1);
  median = quantile(values, 0.5);
  p90 = quantile(values, 0.9);
  max = values.back();
  mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

nlohmann::ordered_json Distribution::json() const {
  nlohmann::ordered_json out;
  out["count"] = count;
  out["mean"] = mean;
  out["min"] = min;
  out["p10"] = p10;
  out["median"] = median;
  out["p90"] = p90;
  out["max"] = max;
  return out;
}

std::string Distribution::text(int decimals) const {
  return fixed(min, decimals) + " / " + fixed(p10, decimals) + " / " + fixed(median, decimals) +
         " / " + fixed(p90, decimals) + " / " + fixed(max, decimals);
}

}  // namespace twilight::app
