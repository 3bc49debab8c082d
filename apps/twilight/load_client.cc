#include "load_client.h"

#include <httplib.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "event_parser.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::json;

std::string transport_error(httplib::Error error) {
  switch (error) {
    case httplib::Error::Connection:
    case httplib::Error::ConnectionTimeout:
    case httplib::Error::BindIPAddress:
      return "connect";
    case httplib::Error::Read:
      return "read";
    case httplib::Error::Write:
      return "write";
    default:
      return httplib::to_string(error);
  }
}

// "429 queue_full", from OpenAI's error object where there is one.
std::string status_error(int status, const std::string& body) {
  std::string kind = std::to_string(status);
  const Json json = Json::parse(body, nullptr, false);
  if (json.is_object() && json.contains("error") && json["error"].is_object()) {
    const Json code = json["error"].value("code", Json());
    const Json type = json["error"].value("type", Json());
    if (code.is_string()) return kind + " " + code.get<std::string>();
    if (type.is_string()) return kind + " " + type.get<std::string>();
  }
  return kind;
}

// What one event adds to a result; false: it is no completion's.
bool take_event(const std::string& data, double now, LoadResult& result) {
  const Json json = Json::parse(data, nullptr, false);
  if (!json.is_object()) return false;
  if (json.contains("error")) {
    const Json code = json["error"].is_object() ? json["error"].value("code", Json()) : Json();
    result.error = "stream " + (code.is_string() ? code.get<std::string>() : "error");
    return true;
  }
  if (json.contains("choices") && json["choices"].is_array() && !json["choices"].empty()) {
    const Json& choice = json["choices"].front();
    const Json text = choice.is_object() ? choice.value("text", Json()) : Json();
    if (text.is_string() && !text.get_ref<const std::string&>().empty()) {
      result.times.push_back(now);
    }
  }
  if (json.contains("usage") && json["usage"].is_object()) {
    const Json& usage = json["usage"];
    const auto count = [](const Json& from, const char* name) {
      const Json value = from.value(name, Json());
      return value.is_number_integer() ? value.get<std::int32_t>() : 0;
    };
    result.prompt_tokens = count(usage, "prompt_tokens");
    result.completion_tokens = count(usage, "completion_tokens");
    const Json details = usage.value("prompt_tokens_details", Json());
    if (details.is_object()) result.cached_tokens = count(details, "cached_tokens");
  }
  return true;
}

}  // namespace

LoadClient::LoadClient(std::string url, std::string api_key, double timeout_seconds)
    : url_(std::move(url)), api_key_(std::move(api_key)), timeout_(timeout_seconds) {
  while (!url_.empty() && url_.back() == '/') url_.pop_back();
  bool ok = url_.rfind("http://", 0) == 0;
#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
  ok = ok || url_.rfind("https://", 0) == 0;
#endif
  const std::size_t host = url_.find("//");
  ok = ok && host + 2 < url_.size() && url_.find('/', host + 2) == std::string::npos;
  ok = ok && httplib::Client(url_).is_valid();
  if (!ok) {
    throw Error(ErrorCode::kInvalidArgument, "[--url] address of a server, got '" + url_ +
                                                 "', accepted http://HOST:PORT without a path");
  }
}

LoadClient::~LoadClient() = default;

std::unique_ptr<httplib::Client> LoadClient::connect() const {
  auto client = std::make_unique<httplib::Client>(url_);
  const auto timeout = std::chrono::milliseconds(static_cast<std::int64_t>(timeout_ * 1e3));
  client->set_connection_timeout(std::chrono::seconds(10));
  client->set_read_timeout(timeout);
  client->set_write_timeout(timeout);
  client->set_tcp_nodelay(true);
  httplib::Headers headers = {{"Accept-Encoding", "identity"}};
  if (!api_key_.empty()) headers.emplace("Authorization", "Bearer " + api_key_);
  client->set_default_headers(headers);
  return client;
}

bool LoadClient::enter(httplib::Client* client) {
  const std::lock_guard lock(mutex_);
  if (!cut_) open_.insert(client);
  return !cut_;
}

void LoadClient::leave(httplib::Client* client) {
  const std::lock_guard lock(mutex_);
  open_.erase(client);
}

bool LoadClient::is_cut() {
  const std::lock_guard lock(mutex_);
  return cut_;
}

void LoadClient::cut() {
  const std::lock_guard lock(mutex_);
  cut_ = true;
  for (httplib::Client* client : open_) client->stop();
}

LoadResult LoadClient::complete(const LoadRequest& request, const std::vector<std::int32_t>& prompt,
                                const Extra& extra, Clock::time_point start) {
  const auto now = [start] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  LoadResult result;
  result.request = request;
  Json body = {{"prompt", prompt}, {"max_tokens", request.output_tokens},
               {"temperature", 0}, {"ignore_eos", true},
               {"stream", true},   {"stream_options", {{"include_usage", true}}}};
  if (!extra.attention.empty()) body["attention"] = extra.attention;
  if (!extra.model.empty()) body["model"] = extra.model;
  httplib::Request call;
  call.method = "POST";
  call.path = "/v1/completions";
  call.set_header("Content-Type", "application/json");
  call.body = body.dump();
  EventParser parser;
  std::string refusal;
  int status = 0;
  bool ended = false;
  bool late = false;
  const double until = now() + timeout_;
  call.response_handler = [&](const httplib::Response& response) {
    status = response.status;
    return true;
  };
  call.content_receiver = [&](const char* data, std::size_t size, std::uint64_t /*offset*/,
                              std::uint64_t /*length*/) {
    if (is_cut()) return false;
    if (status != 200) {
      refusal.append(data, size);
      return true;
    }
    const double at = now();
    for (const std::string& event : parser.feed({data, size})) {
      ended = ended || event == "[DONE]";
      if (event != "[DONE]" && !take_event(event, at, result)) result.error = "not JSON";
    }
    late = at > until && !ended;
    return !late;
  };
  const std::unique_ptr<httplib::Client> client = connect();
  httplib::Response response;
  httplib::Error error = httplib::Error::Success;
  result.sent = now();
  bool ok = false;
  if (enter(client.get())) {
    ok = client->send(call, response, error);
    leave(client.get());
  }
  result.done = now();
  if (ended) return result;
  result.cut = is_cut();
  if (result.cut || !result.error.empty()) return result;
  if (ok && status != 200) {
    result.error = status_error(status, refusal);
  } else if (late || result.done >= until) {
    result.error = "timeout";
  } else {
    result.error = ok ? "stream without an end" : transport_error(error);
  }
  return result;
}

LoadClient::ModelEntry LoadClient::model() {
  const auto client = connect();
  const httplib::Result reply = client->Get("/v1/models");
  if (!reply || reply->status != 200) {
    throw Error(ErrorCode::kIo, "[--url] no server answers /v1/models at " + url_ + ": " +
                                    (reply ? status_error(reply->status, reply->body)
                                           : transport_error(reply.error())));
  }
  ModelEntry entry;
  const Json json = Json::parse(reply->body, nullptr, false);
  if (json.is_object() && json.contains("data") && json["data"].is_array() &&
      !json["data"].empty() && json["data"].front().is_object()) {
    const Json& first = json["data"].front();
    const Json id = first.value("id", Json());
    const Json context = first.value("max_model_len", Json());
    if (id.is_string()) entry.id = id.get<std::string>();
    if (context.is_number_integer()) entry.context = context.get<std::int64_t>();
  }
  if (entry.id.empty()) {
    throw Error(ErrorCode::kIo, "[--url] /v1/models lists no model at " + url_);
  }
  return entry;
}

std::map<std::string, double> LoadClient::metrics() {
  std::map<std::string, double> values;
  const auto client = connect();
  const httplib::Result reply = client->Get("/metrics");
  if (!reply || reply->status != 200) return values;
  std::istringstream lines(reply->body);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    double value = 0;
    if (line.empty() || line[0] == '#' || line.find('{') != std::string::npos) continue;
    if (words >> name >> value) values[name] = value;
  }
  return values;
}

}  // namespace twilight::app
