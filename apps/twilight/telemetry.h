#ifndef TWILIGHT_APPS_TELEMETRY_H_
#define TWILIGHT_APPS_TELEMETRY_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "twilight/engine.h"

namespace twilight::app {

/// Whether a step wanted more candidates than it may have: a share of the context beyond
/// max_candidates, or a candidate mass that the whole budget did not reach.
[[nodiscard]] bool cap_hit(const SparsePolicy& policy, const LayerStats& stats);

/// What decode steps did besides what their totals say: layer steps that stayed dense and why,
/// candidate budgets that met their cap, and audited masses against estimated ones. A layer step is
/// one sequence in one layer of one step.
struct Telemetry {
  std::int64_t sparse = 0;
  std::map<std::string, std::int64_t> dense;  ///< layer steps by the name of their path
  std::int64_t cap_hits = 0;                  ///< sparse layer steps
  std::int64_t steps = 0, audited_steps = 0;
  // Over the query heads of audited sparse layer steps:
  std::int64_t audited_heads = 0;
  double estimated_mass_sum = 0, true_mass_sum = 0;

  /// Adds the last step of `engine`, which must have collected its statistics.
  void add_step(const Engine& engine);
  void add(const SparsePolicy& policy, const LayerStats& stats);
  void merge(const Telemetry& other);

  [[nodiscard]] double estimated_mass() const;  ///< mean, 1 where nothing was audited
  [[nodiscard]] double true_mass() const;

  /// Every field, for reports and to be read back.
  [[nodiscard]] nlohmann::ordered_json json() const;
  [[nodiscard]] static Telemetry from_json(const nlohmann::ordered_json& json);

  /// What a user should know of this run under `policy`; empty where all went as asked.
  [[nodiscard]] std::vector<std::string> warnings(const SparsePolicy& policy) const;
  /// One line without its end: what ran, what stayed dense and why, and the warnings. Empty for a
  /// dense policy.
  [[nodiscard]] std::string line(const SparsePolicy& policy) const;
  /// The line without its beginning, the count of sparse layer steps: parts each led by "; ".
  [[nodiscard]] std::string details(const SparsePolicy& policy) const;
  /// The fields, and the warnings as a list.
  [[nodiscard]] nlohmann::ordered_json report(const SparsePolicy& policy) const;
};

/// Audits one decode step in `every` (the first one and each `every`-th after it; none for 0) and
/// gathers telemetry of all of them.
class StepAudit {
 public:
  /// Turns statistics of `engine` on; they stay on afterwards, without audit.
  StepAudit(Engine& engine, std::int32_t every);
  ~StepAudit();
  StepAudit(const StepAudit&) = delete;
  StepAudit& operator=(const StepAudit&) = delete;

  /// After every decode step; settles whether the next one is audited.
  void after_step();
  [[nodiscard]] bool next_is_audited() const { return audited_; }
  [[nodiscard]] const Telemetry& telemetry() const { return telemetry_; }

 private:
  Engine& engine_;
  std::int32_t every_;
  std::int64_t step_ = 0;
  bool audited_ = false;
  Telemetry telemetry_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_TELEMETRY_H_
