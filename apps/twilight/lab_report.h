#ifndef TWILIGHT_APPS_LAB_REPORT_H_
#define TWILIGHT_APPS_LAB_REPORT_H_

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "lab.h"
#include "lab_stats.h"

namespace twilight::app {

/// Everything measured of one preset over some places of the grid.
struct PresetSummary {
  std::int64_t trials = 0, found = 0;  ///< places, and those with the full score
  std::int64_t questions = 0;          ///< of all places
  double score = 0;
  Interval interval;  ///< 95 % of the score, of as many draws as questions
  /// Against the baseline, paired place by place. Its half width is at least what no difference in
  /// that many questions leaves open.
  std::optional<MeanError> score_change;
  double score_change_half_width = 0;
  std::optional<double> same_answers;  ///< share of answers that are the baseline's to the token
  std::int64_t digits = 0, digits_right = 0;
  MeanError nll;                        ///< nats a token, error from blocks of neighbours
  std::optional<MeanError> nll_change;  ///< against the baseline, paired token by token
  DecodeTotals totals;
  Telemetry telemetry;
  double seconds_per_step = 0;  ///< of the steps that were not audited, 0 where there were none
};

/// Which places to take; empty takes all.
using PlaceFilter = std::function<bool(const CellPlace&)>;
[[nodiscard]] PresetSummary summarise(const Lab& lab, std::size_t preset,
                                      const PlaceFilter& filter = {});

/// The report of a finished run: header, one result a preset with its grid, warnings.
[[nodiscard]] nlohmann::ordered_json lab_report(const Lab& lab);

/// The report as tables for people: one line a preset, and scores over the grid where there is one.
[[nodiscard]] std::string lab_table(const Lab& lab);

/// One line for each sparse preset: what ran and what to know of it.
[[nodiscard]] std::string telemetry_lines(const Lab& lab);

/// Metrics every evaluation reports: bytes_ratio, kept_mean, union_mean, true_mass_mean (null where
/// nothing was audited) and what ran.
[[nodiscard]] nlohmann::ordered_json metrics_json(const SparsePolicy& policy,
                                                  const DecodeTotals& totals);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LAB_REPORT_H_
