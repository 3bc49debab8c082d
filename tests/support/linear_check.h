#ifndef TWILIGHT_TESTS_SUPPORT_LINEAR_CHECK_H_
#define TWILIGHT_TESTS_SUPPORT_LINEAR_CHECK_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace twilight::test {

/// Operands of y = x W^T (+ bias) (+ y), rows padded by `pad` numbers.
struct LinearOperands {
  std::int32_t m = 0;
  std::int64_t rows = 0, cols = 0, pad = 0;
  const std::vector<float>& x;        ///< [m, cols + pad]
  const std::vector<float>& weights;  ///< [rows, cols] as stored
  const std::vector<float>* bias;     ///< null for none
  const std::vector<float>& before;   ///< [m, rows + pad] y before the product
  bool accumulate = false;
};

/// With S = sum |x w| + |bias| + |y|: every term takes part in at most cols + 3 f32 roundings, and
/// the reference rounds once: (cols + 4) 2^-24 S. `rounding` is how far, relative, operands that
/// are rounded first move a product. Padding is as before. `shown` names the case.
template <typename Case>
void check_products(const LinearOperands& o, const std::vector<float>& actual,
                    const std::vector<float>& expected, double rounding, const Case& shown) {
  for (std::int64_t m = 0; m < o.m; ++m) {
    for (std::int64_t row = 0; row < o.rows + o.pad; ++row) {
      const auto at = static_cast<std::size_t>(m * (o.rows + o.pad) + row);
      if (row >= o.rows) {
        ASSERT_EQ(actual[at], o.before[at]) << shown << ": wrote behind row " << m;
        continue;
      }
      double products = 0;
      for (std::int64_t i = 0; i < o.cols; ++i) {
        products += std::abs(double{o.x[static_cast<std::size_t>(m * (o.cols + o.pad) + i)]} *
                             double{o.weights[static_cast<std::size_t>(row * o.cols + i)]});
      }
      double size = products * (1 + rounding);
      if (o.bias != nullptr) size += std::abs((*o.bias)[static_cast<std::size_t>(row)]);
      if (o.accumulate) size += std::abs(o.before[at]);
      const double bound = static_cast<double>(o.cols + 4) * 0x1p-24 * size + rounding * products;
      ASSERT_NEAR(actual[at], expected[at], bound) << shown << " at " << m << ", " << row;
    }
  }
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_LINEAR_CHECK_H_
