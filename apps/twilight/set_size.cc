#include "set_size.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace twilight::app {
namespace {

constexpr double kStrongestBoost = 60;  // leaves exp() far from overflow
constexpr int kBisections = 30;

/// The size of the p-set under exact weights as a function of the boost.
class SetSize {
 public:
  SetSize(std::span<const float> logits, const HeadPlan& plan, double p)
      : plan_(plan), p_(p), sink_noise_(static_cast<double>(logits[0])) {
    std::vector<bool> planted(logits.size(), false);
    planted[0] = true;
    for (const std::int32_t token : plan.heavy) {
      planted[static_cast<std::size_t>(token)] = true;
      heavy_noise_.push_back(static_cast<double>(logits[static_cast<std::size_t>(token)]));
    }
    for (std::size_t t = 0; t < logits.size(); ++t) {
      if (!planted[t]) rest_.push_back(std::exp(logits[t]));
    }
    std::sort(rest_.begin(), rest_.end(), std::greater<>());
    rest_mass_ = std::accumulate(rest_.begin(), rest_.end(), 0.0);
    heavy_.resize(heavy_noise_.size());
  }

  /// Tokens, the sink among them.
  std::int32_t at(double boost) {
    double mass = rest_mass_;
    for (std::size_t i = 0; i < heavy_.size(); ++i) {
      heavy_[i] = std::exp(heavy_noise_[i] + boost * static_cast<double>(plan_.profile[i]));
      mass += heavy_[i];
    }
    std::sort(heavy_.begin(), heavy_.end(), std::greater<>());
    const double sink = mass * plan_.sink_share / (1 - plan_.sink_share);
    sink_logit_ = std::log(sink) - sink_noise_;
    const double target = p_ * (mass + sink);
    double sum = 0;
    bool sink_taken = false;
    std::size_t heavy = 0, rest = 0;
    std::int32_t count = 0;
    while (sum < target) {
      const double a = heavy < heavy_.size() ? heavy_[heavy] : 0;
      const double b = rest < rest_.size() ? static_cast<double>(rest_[rest]) : 0;
      if (!sink_taken && sink >= std::max(a, b)) {
        sum += sink;
        sink_taken = true;
      } else if (a >= b && a > 0) {
        sum += a;
        ++heavy;
      } else if (b > 0) {
        sum += b;
        ++rest;
      } else {
        break;  // rounding of the sums
      }
      ++count;
    }
    return count;
  }

  /// What the last `at` needs on token 0 for the sink's share.
  [[nodiscard]] double sink_logit() const { return sink_logit_; }

 private:
  const HeadPlan& plan_;
  double p_, sink_noise_;
  double rest_mass_ = 0, sink_logit_ = 0;
  std::vector<double> heavy_noise_, heavy_;
  std::vector<float> rest_;  // weights of the other tokens, largest first
};

}  // namespace

void calibrate(std::span<const float> logits, double p, std::int32_t size, HeadPlan& plan) {
  SetSize set(logits, plan, p);
  double low = 0, high = kStrongestBoost;
  for (int step = 0; step < kBisections; ++step) {
    const double middle = (low + high) / 2;
    (set.at(middle) > size ? low : high) = middle;
  }
  plan.boost = high;
  plan.set_size = set.at(high);
  plan.sink_logit = set.sink_logit();
}

}  // namespace twilight::app
