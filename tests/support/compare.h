#ifndef TWILIGHT_TESTS_SUPPORT_COMPARE_H_
#define TWILIGHT_TESTS_SUPPORT_COMPARE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <span>

namespace twilight::test {

/// How far `actual` may be from `expected`: element by element |a - e| <= abs + rel |e|, and
/// 1 - cos(a, e) <= cosine over the whole span. Derivations are in docs/numerics.md.
struct Tolerance {
  double abs = 0;
  double rel = 0;
  double cosine = 1;
};

/// NaN and the infinities in the same places, then every finite element, then the cosine
/// distance of the finite elements. Reports the worst element.
[[nodiscard]] inline ::testing::AssertionResult close(std::span<const float> actual,
                                                      std::span<const float> expected,
                                                      const Tolerance& tolerance) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << "sizes differ: " << actual.size() << " against " << expected.size();
  }
  double dot = 0;
  double norm_a = 0;
  double norm_e = 0;
  double worst = 0;
  std::size_t worst_at = 0;
  std::size_t num_bad = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double a = actual[i];
    const double e = expected[i];
    if (!std::isfinite(a) || !std::isfinite(e)) {
      const bool same = (std::isnan(a) && std::isnan(e)) || a == e;
      if (!same) {
        return ::testing::AssertionFailure()
               << "special values differ at " << i << ": got " << a << ", expected " << e;
      }
      continue;
    }
    dot += a * e;
    norm_a += a * a;
    norm_e += e * e;
    const double error = std::abs(a - e);
    const double allowed = tolerance.abs + tolerance.rel * std::abs(e);
    if (error > allowed) {
      ++num_bad;
      const double ratio = allowed > 0 ? error / allowed : HUGE_VAL;
      if (num_bad == 1 || ratio > worst) {
        worst = ratio;
        worst_at = i;
      }
    }
  }
  if (num_bad > 0) {
    return ::testing::AssertionFailure()
           << num_bad << " of " << actual.size() << " elements differ; worst at " << worst_at
           << ": got " << actual[worst_at] << ", expected " << expected[worst_at] << ", " << worst
           << " times the allowed error";
  }
  if (norm_a > 0 && norm_e > 0) {
    const double distance = 1 - dot / std::sqrt(norm_a * norm_e);
    if (distance > tolerance.cosine) {
      return ::testing::AssertionFailure()
             << "cosine distance " << distance << ", allowed " << tolerance.cosine;
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_COMPARE_H_
