#ifndef TWILIGHT_APPS_CHART_H_
#define TWILIGHT_APPS_CHART_H_

#include <cstdint>
#include <string>
#include <vector>

#include "twilight/engine.h"

namespace twilight::app {

/// Kept tokens of every layer over a generation: what the terminal chart and the JSON of `demo`
/// show.
class BudgetRecorder {
 public:
  explicit BudgetRecorder(std::int32_t num_layers)
      : layers_(static_cast<std::size_t>(num_layers)) {}
  void record(const Engine& engine);

  struct Layer {
    bool sparse = false;
    std::vector<double> kept;  ///< per step and query head
    double tokens = 0;         ///< N of the last step
  };
  [[nodiscard]] const std::vector<Layer>& layers() const { return layers_; }

 private:
  std::vector<Layer> layers_;
};

struct Spread {
  double min = 0, p10 = 0, mean = 0, p90 = 0, max = 0;
};
/// Order statistics of a sample; zeros where it is empty.
[[nodiscard]] Spread spread_of(std::vector<double> values);

/// One line a layer: a bar from the 10th to the 90th percentile on a logarithmic axis, the mean
/// marked, numbers after it. Dense layers say so.
[[nodiscard]] std::string budget_chart(const std::vector<BudgetRecorder::Layer>& layers);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_CHART_H_
