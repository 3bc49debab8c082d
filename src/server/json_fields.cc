#include "server/json_fields.h"

#include <cmath>
#include <utility>

namespace twilight::server {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::size_t kShownBytes = 60;

std::string short_number(double value) {
  return value == std::floor(value) && std::abs(value) < 1e15
             ? std::to_string(static_cast<std::int64_t>(value))
             : Json(value).dump();
}

}  // namespace

Json parse_body(const std::string& body) {
  const auto check_depth = [](int depth, Json::parse_event_t /*event*/, Json& /*parsed*/) {
    if (depth > kMaxDepth) throw ApiError(400, "JSON nested more than 64 deep", "invalid_json");
    return true;
  };
  Json json;
  try {
    json = Json::parse(body, check_depth);
  } catch (const Json::exception&) {
    throw ApiError(400, "the body is not valid JSON", "invalid_json");
  }
  if (!json.is_object()) throw ApiError(400, "the body must be a JSON object", "invalid_json");
  return json;
}

std::string shown(const Json& value) {
  if (value.is_structured()) return value.is_array() ? "an array" : "an object";
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kShownBytes) text = text.substr(0, kShownBytes) + "...";
  return text;
}

JsonFields::JsonFields(const Json& object, std::string prefix)
    : object_(object), prefix_(std::move(prefix)) {}

const Json* JsonFields::find(const char* name) {
  known_.insert(name);
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

ApiError JsonFields::error(const char* name, const std::string& message) const {
  return bad_field(prefix_ + name, message);
}

std::optional<std::int64_t> JsonFields::integer(const char* name, std::int64_t low,
                                                std::int64_t high) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  const std::string accepted =
      ", accepted an integer from " + std::to_string(low) + " to " + std::to_string(high);
  if (value->is_number_unsigned()) {
    const auto number = value->get<std::uint64_t>();
    if (high >= 0 && number <= static_cast<std::uint64_t>(high) &&
        static_cast<std::int64_t>(number) >= low) {
      return static_cast<std::int64_t>(number);
    }
  } else if (value->is_number_integer()) {
    const auto number = value->get<std::int64_t>();
    if (number >= low && number <= high) return number;
  }
  throw error(name, "got " + shown(*value) + accepted);
}

std::optional<double> JsonFields::number(const char* name, double low, double high) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_number()) {
    const auto number = value->get<double>();
    if (number >= low && number <= high) return number;
  }
  throw error(name, "got " + shown(*value) + ", accepted a number from " + short_number(low) +
                        " to " + short_number(high));
}

std::optional<bool> JsonFields::boolean(const char* name) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) throw error(name, "got " + shown(*value) + ", accepted true or false");
  return value->get<bool>();
}

std::optional<std::string> JsonFields::text(const char* name) {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) throw error(name, "got " + shown(*value) + ", accepted a string");
  return value->get<std::string>();
}

void JsonFields::refuse(const char* name, const Json& harmless) {
  const Json* value = find(name);
  if (value == nullptr || *value == harmless) return;
  const std::string accepted = harmless.is_null() ? "" : ", accepted " + harmless.dump();
  throw bad_field(prefix_ + name, "not supported by this server, got " + shown(*value) + accepted,
                  "unsupported_parameter");
}

void JsonFields::finish() const {
  for (const auto& [name, value] : object_.items()) {
    if (!known_.contains(name)) {
      std::string printable = shown(Json(name));
      throw bad_field(prefix_ + name.substr(0, kShownBytes),
                      "unrecognized request argument, got " + printable, "unknown_parameter");
    }
  }
}

}  // namespace twilight::server
