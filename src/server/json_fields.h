#ifndef TWILIGHT_SERVER_JSON_FIELDS_H_
#define TWILIGHT_SERVER_JSON_FIELDS_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "server/api_error.h"

namespace twilight::server {

/// Parses a request body: an object, at most 64 levels deep. Throws ApiError 400.
[[nodiscard]] Json parse_body(const std::string& body);

/// Typed reading of a JSON object's fields; every mistake is an ApiError 400 naming the field. A
/// null counts as absent. `finish` refuses what nobody has asked for.
class JsonFields {
 public:
  /// `object` must outlive this. `prefix` goes before field names in messages.
  explicit JsonFields(const Json& object, std::string prefix = {});

  /// Null where absent.
  [[nodiscard]] const Json* find(const char* name);
  [[nodiscard]] std::optional<std::int64_t> integer(const char* name, std::int64_t low,
                                                    std::int64_t high);
  [[nodiscard]] std::optional<double> number(const char* name, double low, double high);
  [[nodiscard]] std::optional<bool> boolean(const char* name);
  [[nodiscard]] std::optional<std::string> text(const char* name);
  /// A field that this server does not offer: any value but null and `harmless` is refused.
  void refuse(const char* name, const Json& harmless = nullptr);
  /// A field without effect here.
  void ignore(const char* name) { known_.insert(name); }
  void finish() const;

  [[nodiscard]] ApiError error(const char* name, const std::string& message) const;

 private:
  const Json& object_;
  std::string prefix_;
  std::set<std::string> known_;
};

/// A value for a message: short, one line.
[[nodiscard]] std::string shown(const Json& value);

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_JSON_FIELDS_H_
