#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "server/api_server_impl.h"

namespace twilight::server {
namespace {

// Takes the same time wherever two keys of one length differ.
bool same_key(std::string_view given, std::string_view wanted) {
  unsigned differs = given.size() == wanted.size() ? 0 : 1;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const char against = wanted.empty() ? '\0' : wanted[i % wanted.size()];
    differs |= static_cast<unsigned char>(given[i]) ^ static_cast<unsigned char>(against);
  }
  return differs == 0;
}

struct Route {
  const char* method;
  const char* path;
  bool protected_by_key;
};
constexpr std::array<Route, 8> kRoutes = {{{"POST", "/v1/completions", true},
                                           {"POST", "/v1/chat/completions", true},
                                           {"GET", "/v1/models", true},
                                           {"GET", "/v1/models/*", true},
                                           {"GET", "/v1/twilight/kept", true},
                                           {"GET", "/health", false},
                                           {"GET", "/metrics", false},
                                           {"GET", "/", false}}};

bool matches(std::string_view pattern, std::string_view path) {
  if (!pattern.ends_with("*")) return pattern == path;
  pattern.remove_suffix(1);
  return path.starts_with(pattern) && path.size() > pattern.size();
}

// The route, or an ApiError 404 or 405.
const Route& find_route(const std::string& method, const std::string& path) {
  std::string allowed;
  for (const Route& route : kRoutes) {
    if (!matches(route.path, path)) continue;
    if (method == route.method || (method == "HEAD" && std::string_view("GET") == route.method)) {
      return route;
    }
    allowed = route.method;
  }
  if (!allowed.empty()) {
    throw ApiError(405, "method, got " + shown(Json(method)) + ", accepted " + allowed,
                   "method_not_allowed");
  }
  throw ApiError(404, "no such address, got " + shown(Json(path)), "not_found");
}

}  // namespace

// Whether a request goes on to its handler; else `response` is filled.
bool ApiServer::Impl::admit(const httplib::Request& request, httplib::Response& response) {
  try {
    const Route& route = find_route(request.method, request.path);
    if (route.protected_by_key && !options.api_key.empty()) check_key(request);
    if (std::string_view("POST") == route.method) {
      check_length(request);
      if (draining) throw shutting_down();
      const double wait = limit.take(request.remote_addr);
      if (wait > 0) {
        throw ApiError(429, "too many requests from this client", "rate_limit_exceeded")
            .retry_after(static_cast<int>(std::ceil(wait)));
      }
    }
    return true;
  } catch (const ApiError& error) {
    // A body may follow that nobody reads.
    const bool body =
        request.has_header("Content-Length") || request.has_header("Transfer-Encoding");
    if (body && Connection::current() != nullptr) Connection::current()->close_after();
    refuse(request, response, error);
    return false;
  }
}

ApiError ApiServer::Impl::shutting_down() {
  return ApiError(503, "the server is shutting down", "shutdown").retry_after(1);
}

void ApiServer::Impl::check_key(const httplib::Request& request) const {
  const std::string given = request.get_header_value("Authorization");
  constexpr std::string_view kBearer = "Bearer ";
  const bool bearer = std::string_view(given).starts_with(kBearer);
  if (!bearer || !same_key(std::string_view(given).substr(kBearer.size()), options.api_key)) {
    throw ApiError(401, bearer ? "wrong API key" : "no API key given, accepted Bearer KEY",
                   "invalid_api_key");
  }
}

void ApiServer::Impl::check_length(const httplib::Request& request) const {
  if (!request.has_header("Content-Length")) return;
  const std::string text = request.get_header_value("Content-Length");
  std::uint64_t length = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), length);
  if (error == std::errc::invalid_argument || end != text.data() + text.size() ||
      request.get_header_value_count("Content-Length") > 1 ||
      request.has_header("Transfer-Encoding")) {
    throw ApiError(400, "Content-Length, got " + shown(Json(text)) + ", accepted one number",
                   "bad_request");
  }
  if (error != std::errc() || length > options.max_body) {
    throw ApiError(413,
                   "body, got " + text.substr(0, 20) + " bytes, accepted up to " +
                       std::to_string(options.max_body),
                   "too_large");
  }
}

void ApiServer::Impl::refuse(const httplib::Request& request, httplib::Response& response,
                             const ApiError& error) {
  response.status = error.status();
  if (error.retry_after() > 0) {
    response.set_header("Retry-After", std::to_string(error.retry_after()));
  }
  response.set_content(dump(error.body()), kJson);
  metrics.responded("refused", error.status());
  Json fields;
  fields["client"] = request.remote_addr;
  fields["method"] = request.method.substr(0, 16);
  fields["path"] = request.path.substr(0, 128);
  fields["status"] = error.status();
  fields["code"] = error.code();
  fields["message"] = error.what();
  log.write(error.status() >= 500 ? LogLevel::kWarning : LogLevel::kInfo, "refused", fields);
}

}  // namespace twilight::server
