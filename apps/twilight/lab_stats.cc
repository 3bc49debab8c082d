#include "lab_stats.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace twilight::app {

Interval wilson_interval(double mean, std::int64_t count) {
  if (count <= 0) return {};
  const double n = static_cast<double>(count);
  const double z2 = kNormal95 * kNormal95;
  const double centre = (mean + z2 / (2 * n)) / (1 + z2 / n);
  const double reach =
      kNormal95 / (1 + z2 / n) * std::sqrt(mean * (1 - mean) / n + z2 / (4 * n * n));
  return {std::max(0.0, centre - reach), std::min(1.0, centre + reach)};
}

MeanError mean_error(std::span<const double> values) {
  MeanError out;
  out.count = static_cast<std::int64_t>(values.size());
  if (values.empty()) {
    out.standard_error = std::nan("");
    return out;
  }
  const double n = static_cast<double>(values.size());
  out.mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  if (values.size() < 2) {
    out.standard_error = std::nan("");
    return out;
  }
  double squares = 0;
  for (const double value : values) squares += (value - out.mean) * (value - out.mean);
  out.standard_error = std::sqrt(squares / (n - 1) / n);
  return out;
}

MeanError block_mean_error(const std::vector<std::vector<double>>& samples, std::size_t block) {
  std::vector<double> means;
  double sum = 0;
  std::int64_t count = 0;
  for (const std::vector<double>& sample : samples) {
    const std::size_t blocks = std::max<std::size_t>(sample.size() / block, sample.empty() ? 0 : 1);
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::size_t begin = b * block;
      const std::size_t end = b + 1 == blocks ? sample.size() : begin + block;
      double part = 0;
      for (std::size_t i = begin; i < end; ++i) part += sample[i];
      sum += part;
      count += static_cast<std::int64_t>(end - begin);
      means.push_back(part / static_cast<double>(end - begin));
    }
  }
  MeanError out = mean_error(means);
  out.count = count;
  if (count > 0) out.mean = sum / static_cast<double>(count);
  return out;
}

std::vector<std::size_t> pareto_front(std::span<const Point> points) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (std::isfinite(points[i].x) && std::isfinite(points[i].y)) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return points[a].x != points[b].x ? points[a].x < points[b].x : points[a].y < points[b].y;
  });
  std::vector<std::size_t> front;
  for (const std::size_t i : order) {
    if (front.empty() || points[i].y < points[front.back()].y) front.push_back(i);
  }
  return front;
}

}  // namespace twilight::app
