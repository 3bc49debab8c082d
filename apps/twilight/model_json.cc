#include "model_json.h"

#include <cstdio>

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

Json or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

std::string megabytes(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, bytes < 1e5 ? "%.3f MB" : "%.1f MB", bytes / 1e6);
  return text;
}

}  // namespace

std::string weights_held(const WeightTypeShare& type, const Device& device) {
  if (!type.blocks) return {};
  return device.takes_weight_blocks() ? "blocks" : "f16";
}

Json format_json(const ModelInfo& info, const Device& device) {
  Json json;
  json["format"] = info.format;
  json["weight_dtype"] = info.weight_dtype;
  json["weight_types"] = Json::array();
  for (const WeightTypeShare& type : info.weight_types) {
    json["weight_types"].push_back({{"type", type.name},
                                    {"tensors", type.tensors},
                                    {"parameters", type.parameters},
                                    {"bytes", type.bytes},
                                    {"held", or_null(weights_held(type, device))}});
  }
  json["tokenizer"] = or_null(info.tokenizer);
  json["chat_template"] = or_null(info.chat_template);
  if (info.chat_template.empty()) json["no_chat_template"] = info.no_chat_template;
  json["max_context"] = info.max_context;
  json["sliding_window"] = info.sliding_window ? Json(*info.sliding_window) : Json(nullptr);
  return json;
}

std::string format_line(const ModelInfo& info, const Device& device) {
  std::string line = info.format + ", " + info.weight_dtype;
  for (const WeightTypeShare& type : info.weight_types) {
    const std::string held = weights_held(type, device);
    if (type.name != info.weight_dtype || held.empty()) continue;
    line += held == "blocks" ? " in blocks" : " held as f16";
  }
  return line;
}

std::string weight_type_line(const Json& type) {
  std::string line = type["type"].get<std::string>() + ": " + type["tensors"].dump() +
                     (type["tensors"] == 1 ? " tensor, " : " tensors, ") +
                     megabytes(type["bytes"].get<double>());
  if (type["held"] == "blocks") line += ", held in blocks";
  if (type["held"] == "f16") {
    line += ", matrices held as f16: " + megabytes(2 * type["parameters"].get<double>());
  }
  return line;
}

}  // namespace twilight::app
