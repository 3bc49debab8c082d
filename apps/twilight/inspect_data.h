#ifndef TWILIGHT_APPS_INSPECT_DATA_H_
#define TWILIGHT_APPS_INSPECT_DATA_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "twilight/stats.h"

namespace twilight::app {

/// What attention read in one layer over S decode steps; step-major.
struct InspectLayer {
  std::vector<StepPath> path;                      ///< [S]
  std::vector<std::int32_t> tokens;                ///< [S] N
  std::vector<std::int32_t> kept;                  ///< [S, Hq]
  std::vector<float> estimated_mass;               ///< [S, Hq]
  std::vector<float> true_mass;                    ///< [S, Hq], empty without audit
  std::vector<std::int32_t> candidates, attended;  ///< [S, Hkv]

  /// Whether no step was sparse.
  [[nodiscard]] bool all_dense() const {
    for (const StepPath step : path) {
      if (!is_dense(step)) return false;
    }
    return true;
  }
};

/// One generation as `inspect` shows it. Texts are raw: drawing escapes them.
struct InspectData {
  std::string model, policy;
  std::string device;    ///< caption: the model's format, and the device
  std::string question;  ///< what was asked; empty for a plain continuation
  std::string answer;    ///< the generated text
  std::string verdict;   ///< of a hidden fact: "found" or "not found"; else empty
  std::int64_t prompt_tokens = 0;
  std::int32_t q_heads = 0, kv_heads = 0;
  double bytes_ratio = 1;  ///< of dense KV bytes, all layers
  double sparse_bytes_ratio = 1;
  double kept_mean = 0, mass_mean = 0;  ///< over sparse layers
  bool audited = false;                 ///< masses drawn are the true ones
  /// The token each step wrote, [S]; the first token of the answer comes from the prompt's own
  /// pass and has no step.
  std::vector<std::string> step_tokens;
  std::vector<InspectLayer> layers;

  [[nodiscard]] std::size_t steps() const { return step_tokens.size(); }
  /// The masses that are drawn.
  [[nodiscard]] const std::vector<float>& mass(const InspectLayer& layer) const {
    return audited ? layer.true_mass : layer.estimated_mass;
  }
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_INSPECT_DATA_H_
