#ifndef TWILIGHT_APPS_LAB_STATS_H_
#define TWILIGHT_APPS_LAB_STATS_H_

#include <cstdint>
#include <span>
#include <vector>

namespace twilight::app {

/// Standard normal quantile of a two-sided 95 % interval.
inline constexpr double kNormal95 = 1.959963984540054;

struct Interval {
  double low = 0, high = 1;
  [[nodiscard]] double half_width() const { return (high - low) / 2; }
};

/// Wilson's 95 % interval of a mean of `count` values in [0, 1]. Exact for values that are 0 or 1;
/// for values between, whose variance is smaller, it is on the wide side. [0, 1] where count is 0.
[[nodiscard]] Interval wilson_interval(double mean, std::int64_t count);

/// Mean of a sample and the standard error of it, which is NaN for fewer than two values.
struct MeanError {
  double mean = 0, standard_error = 0;
  std::int64_t count = 0;
  [[nodiscard]] double half_width() const { return kNormal95 * standard_error; }
};
[[nodiscard]] MeanError mean_error(std::span<const double> values);

/// The same over means of runs of `block` neighbouring values, which holds where neighbours are
/// alike, as the losses of neighbouring tokens are. Blocks do not span the samples; a remainder
/// joins the last block of its sample. `mean` is that of all values.
[[nodiscard]] MeanError block_mean_error(const std::vector<std::vector<double>>& samples,
                                         std::size_t block);

/// Points no other point beats: none has a smaller x without a larger y. Indices in order of x.
/// Points with an x or y that is not finite are left out.
struct Point {
  double x = 0, y = 0;
};
[[nodiscard]] std::vector<std::size_t> pareto_front(std::span<const Point> points);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LAB_STATS_H_
