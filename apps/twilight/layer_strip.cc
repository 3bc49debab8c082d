#include "layer_strip.h"

#include <algorithm>
#include <cmath>

#include "distribution.h"
#include "markup.h"

namespace twilight::app {

double ValueAxis::share(double value) const {
  if (logarithmic) {
    const double span = std::log2(high) - std::log2(low);
    return std::clamp((std::log2(std::max(value, low)) - std::log2(low)) / span, 0.0, 1.0);
  }
  return std::clamp((value - low) / (high - low), 0.0, 1.0);
}

std::vector<double> ValueAxis::ticks(double min_gap) const {
  std::vector<double> out;
  const double most = std::max(width / min_gap, 1.0);
  if (logarithmic) {
    const double octaves = std::log2(high) - std::log2(low);
    const double step = std::max(std::ceil(octaves / most - 1e-9), 1.0);
    for (double e = std::ceil(std::log2(low) - 1e-9); e <= std::log2(high) + 1e-9; e += step) {
      out.push_back(std::exp2(e));
    }
    return out;
  }
  const double raw = (high - low) / most;
  const double decade = std::pow(10, std::floor(std::log10(raw)));
  double step = 10 * decade;
  for (const double factor : {5.0, 2.0, 1.0}) {
    if (factor * decade >= raw * (1 - 1e-9)) step = factor * decade;
  }
  for (double i = std::ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; ++i) {
    out.push_back(i * step);
  }
  return out;
}

std::string draw_violin(const std::vector<double>& values, const ValueAxis& axis, double y,
                        double height) {
  if (values.empty()) return {};
  const Distribution spread(values);
  constexpr int kBins = 64;
  // Triangular smoothing over two bins to each side.
  std::vector<double> raw(kBins + 1, 0.0), smooth(kBins + 1, 0.0);
  for (const double value : values) {
    raw[static_cast<std::size_t>(std::lround(axis.share(value) * kBins))] += 1;
  }
  for (int bin = 0; bin <= kBins; ++bin) {
    for (int d = -2; d <= 2; ++d) {
      const int from = std::clamp(bin + d, 0, kBins);
      smooth[static_cast<std::size_t>(bin)] +=
          (3 - std::abs(d)) * raw[static_cast<std::size_t>(from)];
    }
  }
  const double peak = *std::max_element(smooth.begin(), smooth.end());
  int first = 0, last = kBins;
  while (smooth[static_cast<std::size_t>(first)] <= 0) ++first;
  while (smooth[static_cast<std::size_t>(last)] <= 0) --last;
  const double middle = y + height / 2;
  std::string upper, lower;
  for (int bin = first; bin <= last; ++bin) {
    const double half = smooth[static_cast<std::size_t>(bin)] / peak * height / 2;
    const std::string x = coordinate(axis.x + axis.width * bin / kBins);
    upper += concat(bin == first ? "M" : "L", x, " ", coordinate(middle - half));
    lower.insert(0, concat("L", x, " ", coordinate(middle + half)));
  }
  const double p10 = axis.at(spread.p10), p90 = axis.at(spread.p90), mid = axis.at(spread.median);
  const double bar = std::min(height, 4.0), tall = std::min(height, 14.0);
  return "<path class=\"violin\" d=\"" + upper + lower + "z\"/>" + "<path class=\"spread\" d=\"M" +
         coordinate(p10) + " " + coordinate(middle - bar / 2) + "h" +
         coordinate(std::max(p90 - p10, 1.0)) + "v" + coordinate(bar) + "H" + coordinate(p10) +
         "z\"/>" + "<path class=\"median\" d=\"M" + coordinate(mid) + " " +
         coordinate(middle - tall / 2) + "v" + coordinate(tall) + "\"/>";
}

}  // namespace twilight::app
