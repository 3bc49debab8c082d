#ifndef TWILIGHT_MODEL_TOKENIZER_JSON_FIELD_H_
#define TWILIGHT_MODEL_TOKENIZER_JSON_FIELD_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace twilight {

/// A place in a parsed JSON file that knows its name, so that every mistake is reported as
/// `[file] field a.b[2], got VALUE, accepted SET`. The document must outlive it.
class JsonField {
 public:
  /// `file` must outlive the object.
  JsonField(const nlohmann::json& value, const std::string& file, std::string path)
      : value_(&value), file_(&file), path_(std::move(path)) {}

  [[nodiscard]] const nlohmann::json& json() const { return *value_; }
  [[nodiscard]] const std::string& path() const { return path_; }

  /// True if this object has `key` and it is not null.
  [[nodiscard]] bool has(const char* key) const;
  /// Member of an object; rejects if absent.
  [[nodiscard]] JsonField at(const char* key) const;
  [[nodiscard]] JsonField element(std::size_t index) const;
  /// Number of elements; rejects what is no array.
  [[nodiscard]] std::size_t array_size() const;

  [[nodiscard]] const std::string& string() const;
  [[nodiscard]] bool boolean() const;
  /// Member `key` as a boolean, or `otherwise` where absent or null.
  [[nodiscard]] bool boolean_or(const char* key, bool otherwise) const;
  /// An integer in [0, limit).
  [[nodiscard]] std::int32_t index_below(std::int32_t limit) const;

  /// Throws Error(kInvalidFile) about this field.
  [[noreturn]] void reject(std::string_view accepted) const;
  /// Throws Error(kUnsupported) about this field.
  [[noreturn]] void unsupported(std::string_view accepted) const;

 private:
  [[nodiscard]] std::string shown() const;

  const nlohmann::json* value_;
  const std::string* file_;
  std::string path_;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_JSON_FIELD_H_
