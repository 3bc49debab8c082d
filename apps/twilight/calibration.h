#ifndef TWILIGHT_APPS_CALIBRATION_H_
#define TWILIGHT_APPS_CALIBRATION_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

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

/// The search of `twilight calibrate`: a p for all sparse layers, then whether fewer dense layers
/// at that p or a higher one read less, then a p by layer; each choice is measured whole on the
/// first stretch of text before it is believed, the last one on the second.
class Calibration {
 public:
  Calibration(const CalibrateFlags& flags, double target);
  /// Exit status.
  int run();

 private:
  /// A number of dense layers and a rung of the ladder.
  using Place = std::pair<std::int32_t, std::size_t>;

  [[nodiscard]] SparsePolicy policy_at(Place place) const;
  [[nodiscard]] Trial measure(TextPart& part, const SparsePolicy& policy, const std::string& what,
                              std::size_t positions = 0);
  const Trial& trial(TextPart& part, Place place);
  [[nodiscard]] const Trial* find(Place place) const;
  [[nodiscard]] std::optional<Place> walk(TextPart& part);
  [[nodiscard]] Place try_dense_layers(TextPart& part, Place chosen);
  [[nodiscard]] std::optional<Trial> try_layers(TextPart& part, Place chosen);
  [[nodiscard]] std::string advice(Place chosen) const;
  void print(const TextPart& part, const TextPart& held_out, const Trial& proposal,
             const Trial& check, Place chosen) const;

  const CalibrateFlags& flags_;
  double target_;
  SparsePolicy base_;
  OutputFile out_;
  Device device_;
  Model model_;
  Engine engine_;
  std::map<Place, Trial> trials_;  // with one p for all layers
  std::string layers_note_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_CALIBRATION_H_
