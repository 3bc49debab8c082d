#ifndef TWILIGHT_APPS_EVAL_H_
#define TWILIGHT_APPS_EVAL_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "flags.h"
#include "output.h"
#include "twilight/engine.h"

namespace twilight::app {

/// What the evaluations share: a model, a text and the presets to compare over the same prompts.
struct EvalFlags {
  CommonFlags common;
  AttentionFlags attention;
  std::vector<std::string> presets = {"paper"};
  std::string model, text, out;
  std::int32_t context = 4096;
  bool audit = true;
  bool force = false;

  void add(CLI::App& command);
  /// One policy a preset, in order. Throws before any work for a bad one.
  [[nodiscard]] std::vector<SparsePolicy> policies() const;
};

/// Model, engine and text of one evaluation.
struct EvalSetup {
  EvalSetup(const EvalFlags& flags, std::int32_t extra_tokens);

  std::vector<SparsePolicy> policies;
  OutputFile out;
  Device device;
  Model model;
  std::string text;
  Engine engine;
};

/// Metrics every evaluation reports: bytes_ratio, kept_mean, union_mean, true_mass_mean and what
/// ran.
[[nodiscard]] nlohmann::ordered_json metrics_json(const SparsePolicy& policy,
                                                  const DecodeTotals& totals);

/// Prints (as JSON or a table of `columns`) and writes the report. A single result's fields are
/// also put at the top level.
void finish_report(nlohmann::ordered_json report, const nlohmann::ordered_json& results,
                   const std::vector<std::string>& columns, const EvalFlags& flags,
                   EvalSetup& setup);

struct PplFlags {
  EvalFlags eval;
  std::int32_t last = 1024;
};
int run_eval_ppl(const PplFlags& flags);

struct PasskeyFlags {
  EvalFlags eval;
  std::vector<double> depths = {0.1, 0.3, 0.5, 0.7, 0.9};
  std::int32_t trials = 8;
  std::uint64_t seed = 1;
};
int run_eval_passkey(const PasskeyFlags& flags);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_EVAL_H_
