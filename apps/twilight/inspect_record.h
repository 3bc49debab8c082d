#ifndef TWILIGHT_APPS_INSPECT_RECORD_H_
#define TWILIGHT_APPS_INSPECT_RECORD_H_

#include <nlohmann/json.hpp>

#include "inspect_data.h"
#include "twilight/engine.h"

namespace twilight::app {

/// Adds the last step of sequence 0, every layer, to `data.layers`.
void record_step(const Engine& engine, InspectData& data);

/// Per layer: path and N of every step; "heads" with kept and mass, "kv_heads" with union and
/// candidates, each a list over the steps.
[[nodiscard]] nlohmann::ordered_json layers_json(const InspectData& data);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_INSPECT_RECORD_H_
