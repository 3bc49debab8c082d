#ifndef TWILIGHT_APPS_DISTRIBUTION_H_
#define TWILIGHT_APPS_DISTRIBUTION_H_

#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

namespace twilight::app {

/// The value that a share of `sorted` values lies below: between two neighbours, in proportion. Not
/// for an empty set.
[[nodiscard]] double quantile(std::span<const double> sorted, double share);

/// What a set of measured values looks like; all zero for an empty one.
struct Distribution {
  std::size_t count = 0;
  double min = 0, p10 = 0, median = 0, p90 = 0, max = 0, mean = 0;

  Distribution() = default;
  explicit Distribution(std::vector<double> values);
  [[nodiscard]] nlohmann::ordered_json json() const;
  /// "min / p10 / median / p90 / max" with so many decimals.
  [[nodiscard]] std::string text(int decimals) const;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_DISTRIBUTION_H_
