#ifndef TWILIGHT_SERVER_API_ERROR_H_
#define TWILIGHT_SERVER_API_ERROR_H_

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace twilight::server {

using Json = nlohmann::ordered_json;

/// A refusal as OpenAI's interface words it: {"error": {message, type, param, code}} under an HTTP
/// status.
class ApiError : public std::runtime_error {
 public:
  ApiError(int status, const std::string& message, std::string code, std::string param = {});

  [[nodiscard]] int status() const { return status_; }
  /// Empty: null in the body.
  [[nodiscard]] const std::string& code() const { return code_; }
  [[nodiscard]] const std::string& param() const { return param_; }
  /// Seconds for Retry-After; 0: no such header.
  [[nodiscard]] int retry_after() const { return retry_after_; }
  ApiError& retry_after(int seconds) {
    retry_after_ = seconds;
    return *this;
  }
  [[nodiscard]] Json body() const;

 private:
  int status_;
  std::string code_, param_;
  int retry_after_ = 0;
};

/// 400 about one field: "name: what, got VALUE, accepted SET".
[[nodiscard]] ApiError bad_field(const std::string& name, const std::string& message,
                                 const std::string& code = "invalid_value");

/// A JSON text of valid UTF-8, whatever the strings hold.
[[nodiscard]] std::string dump(const Json& json);

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_API_ERROR_H_
