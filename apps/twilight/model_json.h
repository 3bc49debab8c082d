#ifndef TWILIGHT_APPS_MODEL_JSON_H_
#define TWILIGHT_APPS_MODEL_JSON_H_

#include <nlohmann/json.hpp>
#include <string>

#include "twilight/engine.h"

namespace twilight::app {

/// How an engine on that device holds weights of this type: "blocks" as in the file, "f16" copies
/// of its matrices, or "" where the type is no quantised one.
[[nodiscard]] std::string weights_held(const WeightTypeShare& type, const Device& device);

/// Format, element types and how the device holds them, tokenizer, chat template, context and
/// window. Absent ones are null.
[[nodiscard]] nlohmann::ordered_json format_json(const ModelInfo& info, const Device& device);

/// "gguf v3, Q4_K in blocks", for a caption.
[[nodiscard]] std::string format_line(const ModelInfo& info, const Device& device);

/// "Q4_K: 15 tensors, 12.4 MB, held in blocks"
[[nodiscard]] std::string weight_type_line(const nlohmann::ordered_json& type);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_MODEL_JSON_H_
