#include "model/json_reader.h"

#include <cmath>
#include <limits>
#include <unordered_set>
#include <utility>

#include "core/check.h"

namespace twilight {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxQuoted = 120;

std::string printable(std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text) {
    if (out.size() >= kMaxQuoted) return out + "...";
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out;
}

// A value for a message: compact JSON, cut.
std::string shown(const json& value) {
  if (value.is_object()) return "an object";
  return printable(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

}  // namespace

std::string quote_name(std::string_view text) { return '\'' + printable(text) + '\''; }

json parse_json(std::string_view text, std::string_view where, const std::string& path) {
  // One set of the keys seen so far for each object that is open.
  std::vector<std::unordered_set<std::string>> open;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxDepth) {
      fail(ErrorCode::kInvalidFile, where, path, ": JSON nesting, got more than ", kMaxDepth,
           " levels, accepted at most ", kMaxDepth);
    }
    if (event == json::parse_event_t::object_start) {
      open.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      open.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!open.back().insert(key).second) {
        fail(ErrorCode::kInvalidFile, where, path, ": key ", quote_name(key),
             ", got it twice in one object, accepted once");
      }
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& error) {
    fail(ErrorCode::kInvalidFile, where, path, ": not valid JSON: ", printable(error.what()));
  }
}

JsonReader::JsonReader(const json& object, std::string_view where, const std::string& path,
                       std::string prefix)
    : object_(object), where_(where), path_(path), prefix_(std::move(prefix)) {
  if (!object.is_object()) {
    const std::string name = prefix_.empty() ? "document" : prefix_.substr(0, prefix_.size() - 1);
    fail(ErrorCode::kInvalidFile, where_, path_, ": ", name, ", got ", shown(object),
         ", accepted an object");
  }
}

const json* JsonReader::find(const char* field) const {
  const auto it = object_.find(field);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

bool JsonReader::has(const char* field) const { return find(field) != nullptr; }

void JsonReader::reject(const char* field, std::string_view accepted, ErrorCode code) const {
  const json* value = find(field);
  fail(code, where_, path_, ": ", prefix_, field, ", got ",
       value == nullptr ? (object_.contains(field) ? "null" : "nothing") : shown(*value),
       ", accepted ", accepted);
}

std::int64_t JsonReader::integer_value(const json& value, const char* field, std::int64_t low,
                                       std::int64_t high) const {
  bool ok = value.is_number_integer();
  if (value.is_number_unsigned()) {
    ok = value.get<std::uint64_t>() <=
         static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  }
  const std::int64_t out = ok ? value.get<std::int64_t>() : 0;
  if (!ok || out < low || out > high) {
    reject(field, cat("an integer from ", low, " to ", high));
  }
  return out;
}

std::int64_t JsonReader::integer(const char* field, std::int64_t low, std::int64_t high) const {
  const json* value = find(field);
  if (value == nullptr) reject(field, cat("an integer from ", low, " to ", high));
  return integer_value(*value, field, low, high);
}

std::int64_t JsonReader::integer_or(const char* field, std::int64_t low, std::int64_t high,
                                    std::int64_t missing) const {
  return has(field) ? integer(field, low, high) : missing;
}

double JsonReader::number(const char* field, double low, double high) const {
  const json* value = find(field);
  const double out = value != nullptr && value->is_number() ? value->get<double>() : NAN;
  if (!(out >= low && out <= high)) reject(field, cat("a number from ", low, " to ", high));
  return out;
}

double JsonReader::number_or(const char* field, double low, double high, double missing) const {
  return has(field) ? number(field, low, high) : missing;
}

bool JsonReader::boolean_or(const char* field, bool missing) const {
  const json* value = find(field);
  if (value == nullptr) return missing;
  if (!value->is_boolean()) reject(field, "true or false");
  return value->get<bool>();
}

std::optional<std::string> JsonReader::string(const char* field) const {
  const json* value = find(field);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) reject(field, "a string");
  return value->get<std::string>();
}

std::vector<std::int64_t> JsonReader::integers(const char* field, std::int64_t low,
                                               std::int64_t high) const {
  std::vector<std::int64_t> out;
  const json* value = find(field);
  if (value == nullptr) return out;
  if (!value->is_array()) return {integer_value(*value, field, low, high)};
  for (const json& item : *value) out.push_back(integer_value(item, field, low, high));
  return out;
}

JsonReader JsonReader::object(const char* field) const {
  const json* value = find(field);
  if (value == nullptr) reject(field, "an object");
  return {*value, where_, path_, prefix_ + field + '.'};
}

}  // namespace twilight
