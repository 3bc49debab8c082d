#ifndef TWILIGHT_APPS_BENCH_OP_REPORT_H_
#define TWILIGHT_APPS_BENCH_OP_REPORT_H_

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "twilight/policy.h"
#include "twilight/stats.h"
#include "workload.h"

namespace twilight::app {

/// What one policy read and kept, how far its outputs are from dense ones, and how long it took.
struct OpResult {
  SparsePolicy policy;
  std::set<std::string> paths;  ///< what ran, and why where that is dense
  // Of one step on every batch, with the true mass.
  DecodeTotals totals;
  std::vector<double> candidates, unions;               ///< of every KV head
  std::vector<double> kept, estimated_mass, true_mass;  ///< of every query head
  std::vector<double> cosines;                          ///< of every query head's output
  double max_difference = 0, difference_sum = 0;        ///< absolute, of output elements
  std::size_t difference_count = 0;
  // Timed.
  std::vector<double> seconds;

  void add(const LayerStats& stats);
  /// Outputs [.., D] of the same step.
  void compare(std::span<const float> dense, std::span<const float> out, std::int32_t head_dim);
};

/// A whole run. The first result is the dense one.
struct OpReport {
  std::string device, dtype, data;
  nlohmann::ordered_json data_json;
  std::int32_t batch = 0, context = 0, page_size = 0, copies = 0, repeats = 0;
  LayerShape shape;
  std::int64_t state_bytes = 0, kv_bytes = 0, cache_bytes = 0, walk_bytes = 0;
  std::vector<double> bandwidth, load;  ///< GB/s and load average, before and after
  std::vector<double> begin_seconds, append_seconds;
  std::vector<const OpResult*> results;

  [[nodiscard]] nlohmann::ordered_json json() const;
  [[nodiscard]] std::string text() const;

 private:
  [[nodiscard]] nlohmann::ordered_json result_json(const OpResult& result) const;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_BENCH_OP_REPORT_H_
