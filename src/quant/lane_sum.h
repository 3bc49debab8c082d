#ifndef TWILIGHT_QUANT_LANE_SUM_H_
#define TWILIGHT_QUANT_LANE_SUM_H_

#include <cstddef>
#include <span>

namespace twilight {

/// Sum of term(0) .. term(count - 1) in f32 with the order every implementation follows: 16 lanes,
/// lane i adding terms i, i + 16, ... in order, then lanes folded 8, 4, 2, 1 (lane i += lane i + 8,
/// and so on).
template <typename Term>
[[nodiscard]] float lane_sum(std::size_t count, const Term& term) {
  float lanes[16] = {};
  for (std::size_t i = 0; i < count; ++i) lanes[i % 16] += term(i);
  for (std::size_t width = 8; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

/// lane_sum of x^2.
[[nodiscard]] inline float sum_of_squares(std::span<const float> x) {
  return lane_sum(x.size(), [&](std::size_t i) { return x[i] * x[i]; });
}

}  // namespace twilight

#endif  // TWILIGHT_QUANT_LANE_SUM_H_
