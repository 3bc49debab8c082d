#ifndef TWILIGHT_MODEL_JSON_READER_H_
#define TWILIGHT_MODEL_JSON_READER_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "twilight/error.h"

namespace twilight {

/// `text` in single quotes, one printable line: control and non-ASCII bytes become \xNN, and long
/// text is cut. For names that come from files.
[[nodiscard]] std::string quote_name(std::string_view text);

/// Parses one JSON document. Throws Error(kInvalidFile) `[where] path: ...` for a syntax error, a
/// key that occurs twice in one object, or more than 64 levels of nesting.
[[nodiscard]] nlohmann::json parse_json(std::string_view text, std::string_view where,
                                        const std::string& path);

/// Typed access to the fields of one JSON object. A field that is absent or null counts as missing.
/// Every error is Error(kInvalidFile) `[where] path: field, got VALUE, accepted SET`. Keeps
/// references to its constructor arguments.
class JsonReader {
 public:
  /// `prefix` goes before field names in messages, e.g. "rope_scaling.". Throws unless `object` is
  /// one.
  JsonReader(const nlohmann::json& object, std::string_view where, const std::string& path,
             std::string prefix = {});

  [[nodiscard]] bool has(const char* field) const;
  /// The value, or nullptr where it is missing.
  [[nodiscard]] const nlohmann::json* find(const char* field) const;

  /// Integers in [low, high]. A number with a fraction or an exponent is not an integer.
  [[nodiscard]] std::int64_t integer(const char* field, std::int64_t low, std::int64_t high) const;
  [[nodiscard]] std::int64_t integer_or(const char* field, std::int64_t low, std::int64_t high,
                                        std::int64_t missing) const;
  /// Finite numbers in [low, high]; integers count as numbers.
  [[nodiscard]] double number(const char* field, double low, double high) const;
  [[nodiscard]] double number_or(const char* field, double low, double high, double missing) const;
  [[nodiscard]] bool boolean_or(const char* field, bool missing) const;
  [[nodiscard]] std::optional<std::string> string(const char* field) const;
  /// An integer or a list of integers, each in [low, high]; empty where the field is missing.
  [[nodiscard]] std::vector<std::int64_t> integers(const char* field, std::int64_t low,
                                                   std::int64_t high) const;
  /// The object in `field`; the field must be present.
  [[nodiscard]] JsonReader object(const char* field) const;

  /// Throws the error for `field` with the value it holds.
  [[noreturn]] void reject(const char* field, std::string_view accepted,
                           ErrorCode code = ErrorCode::kInvalidFile) const;

 private:
  std::int64_t integer_value(const nlohmann::json& value, const char* field, std::int64_t low,
                             std::int64_t high) const;

  const nlohmann::json& object_;
  std::string_view where_;
  const std::string& path_;
  std::string prefix_;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_JSON_READER_H_
