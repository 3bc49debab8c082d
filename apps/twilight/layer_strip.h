#ifndef TWILIGHT_APPS_LAYER_STRIP_H_
#define TWILIGHT_APPS_LAYER_STRIP_H_

#include <string>
#include <vector>

namespace twilight::app {

/// A horizontal axis of values, linear or logarithmic, over pixels x .. x + width.
struct ValueAxis {
  double low = 0, high = 1;  ///< values at the two ends; above 0 and low < high where logarithmic
  bool logarithmic = false;
  double x = 0, width = 0;

  /// 0 .. 1 along the axis, clamped.
  [[nodiscard]] double share(double value) const;
  [[nodiscard]] double at(double value) const { return x + width * share(value); }
  /// Round values inside the axis, at least `min_gap` pixels apart: powers of two where
  /// logarithmic, else multiples of 1, 2 or 5 times a power of ten.
  [[nodiscard]] std::vector<double> ticks(double min_gap) const;
};

/// The distribution of `values` as SVG: a smoothed mirrored outline between y and y + height,
/// a bar from the 10th to the 90th percentile and a line at the median. Empty text for no values.
[[nodiscard]] std::string draw_violin(const std::vector<double>& values, const ValueAxis& axis,
                                      double y, double height);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LAYER_STRIP_H_
