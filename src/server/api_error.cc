#include "server/api_error.h"

#include <utility>

namespace twilight::server {
namespace {

const char* type_of(int status) {
  if (status == 401) return "authentication_error";
  if (status == 429) return "rate_limit_error";
  return status >= 500 ? "server_error" : "invalid_request_error";
}

Json or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

}  // namespace

ApiError::ApiError(int status, const std::string& message, std::string code, std::string param)
    : std::runtime_error(message),
      status_(status),
      code_(std::move(code)),
      param_(std::move(param)) {}

Json ApiError::body() const {
  Json error;
  error["message"] = what();
  error["type"] = type_of(status_);
  error["param"] = or_null(param_);
  error["code"] = or_null(code_);
  Json body;
  body["error"] = std::move(error);
  return body;
}

ApiError bad_field(const std::string& name, const std::string& message, const std::string& code) {
  return ApiError(400, name + ": " + message, code, name);
}

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace twilight::server
