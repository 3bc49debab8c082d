#ifndef TWILIGHT_APPS_CALIBRATION_H_
#define TWILIGHT_APPS_CALIBRATION_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "calibrate.h"
#include "flags.h"
#include "output.h"

namespace twilight::app {

struct CalibrateFlags {
  CommonFlags common;
  AttentionFlags attention;
  std::string model, text, out, target = "0.5%";
  std::int32_t context = 8192, last = 512, audit_every = 8;
  bool force = false, no_layers = false, labels = false;
  std::int32_t label_channels = 0;
};

[[nodiscard]] EngineOptions engine_options(const CalibrateFlags& flags);

/// The search of `twilight calibrate`: a p for all sparse layers, then how many layers must stay
/// dense, then a p by layer; each choice is measured whole on the first stretch of text before it
/// is believed, the last one on the second.
class Calibration {
 public:
  Calibration(const CalibrateFlags& flags, double target);
  /// Exit status.
  int run();

 private:
  [[nodiscard]] SparsePolicy policy_at(float p) const;
  [[nodiscard]] Trial measure(TextPart& part, const SparsePolicy& policy, const std::string& what,
                              std::size_t positions = 0);
  const Trial& rung(TextPart& part, std::size_t i);
  [[nodiscard]] std::optional<std::size_t> walk(TextPart& part);
  [[nodiscard]] std::optional<Trial> try_dense_layers(TextPart& part, std::size_t chosen);
  [[nodiscard]] std::optional<Trial> try_layers(TextPart& part, std::size_t chosen,
                                                const Trial& all);
  [[nodiscard]] std::string advice(std::size_t chosen) const;
  void print(const TextPart& part, const TextPart& held_out, const Trial& proposal,
             const Trial& check, std::size_t chosen) const;

  const CalibrateFlags& flags_;
  double target_;
  SparsePolicy base_;
  OutputFile out_;
  Device device_;
  Model model_;
  Engine engine_;
  std::map<std::size_t, Trial> rungs_;  // measured ones of the ladder
  std::vector<Trial> fewer_dense_;      // what fewer dense layers were tried with
  std::string layers_note_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_CALIBRATION_H_
