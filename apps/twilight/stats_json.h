#ifndef TWILIGHT_APPS_STATS_JSON_H_
#define TWILIGHT_APPS_STATS_JSON_H_

#include <nlohmann/json.hpp>
#include <string>

#include "twilight/engine.h"

namespace twilight::app {

/// Every field of a policy; "dense" alone for a dense one.
[[nodiscard]] nlohmann::ordered_json policy_json(const SparsePolicy& policy);

/// bytes_ratio, kept_mean, union_mean, candidates_mean, masses and what ran.
[[nodiscard]] nlohmann::ordered_json totals_json(const DecodeTotals& totals);

/// "2048 + 64 tokens, prefill 3,000 tok/s, decode 120 tok/s, 18 % of KV bytes read", from a
/// generate report.
[[nodiscard]] std::string summary_line(const nlohmann::ordered_json& report);

/// Collects the statistics of every decode step of sequence 0 for --stats files.
class StepRecorder {
 public:
  explicit StepRecorder(bool enabled)
      : enabled_(enabled), steps_(nlohmann::ordered_json::array()) {}
  void record(const Engine& engine);
  [[nodiscard]] const nlohmann::ordered_json& steps() const { return steps_; }

 private:
  bool enabled_;
  nlohmann::ordered_json steps_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_STATS_JSON_H_
