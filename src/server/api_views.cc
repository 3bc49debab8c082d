#include <cmath>
#include <optional>
#include <string_view>

#include "server/api_server_impl.h"
#include "server/page.h"

namespace twilight::server {

Json ApiServer::Impl::model_json() const {
  const ModelInfo& info = scheduler.model().info();
  Json json;
  json["id"] = options.model_id;
  json["object"] = "model";
  json["created"] = started_at;
  json["owned_by"] = "twilight";
  json["max_model_len"] = context_tokens;
  json["parameters"] = info.parameters;
  return json;
}

void ApiServer::Impl::models(const httplib::Request& /*request*/, httplib::Response& response) {
  Json json;
  json["object"] = "list";
  json["data"] = Json::array({model_json()});
  response.set_content(dump(json), kJson);
}

void ApiServer::Impl::one_model(const httplib::Request& request, httplib::Response& response) {
  const std::string id = request.path.substr(std::string_view("/v1/models/").size());
  if (id != options.model_id) {
    throw ApiError(404, "no such model, got " + shown(Json(id)) + ", accepted " + options.model_id,
                   "model_not_found", "model");
  }
  response.set_content(dump(model_json()), kJson);
}

void ApiServer::Impl::health(const httplib::Request& /*request*/, httplib::Response& response) {
  const SchedulerStats stats = scheduler.stats();
  const ModelInfo& info = scheduler.model().info();
  Json json;
  json["status"] = draining ? "draining" : "ok";
  json["version"] = options.version;
  json["model"] = options.model_id;
  json["uptime_seconds"] = std::round(seconds_since(started) * 1e3) / 1e3;
  json["attention"] = scheduler.options().engine.policy.name;
  json["attn_p"] = scheduler.options().engine.policy.p;
  json["context"] = context_tokens;
  json["layers"] = info.num_layers;
  json["kv_heads"] = info.num_kv_heads;
  json["chat_format"] = chat->name();
  json["running"] = stats.running;
  json["queued"] = stats.queued;
  json["connections"] = http.connections();
  if (draining) response.status = 503;
  response.set_content(dump(json), kJson);
}

void ApiServer::Impl::show_metrics(const httplib::Request& /*request*/,
                                   httplib::Response& response) {
  response.set_content(metrics.text(), "text/plain; version=0.0.4");
}

void ApiServer::Impl::page(const httplib::Request& /*request*/, httplib::Response& response) {
  response.set_header("Content-Security-Policy",
                      "default-src 'none'; style-src 'unsafe-inline'; script-src "
                      "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'");
  response.set_content(kPage.data(), kPage.size(), "text/html; charset=utf-8");
}

void ApiServer::Impl::kept(const httplib::Request& request, httplib::Response& response) {
  const std::string id = request.get_param_value("id");
  std::optional<Scheduler::Id> scheduled;
  {
    const std::lock_guard lock(jobs_mutex);
    const auto found = jobs.find(id);
    if (found != jobs.end()) scheduled = found->second.front();
  }
  if (!scheduled) {
    throw ApiError(404, "no running request has this id, got " + shown(Json(id)), "not_found",
                   "id");
  }
  const auto live = scheduler.live_kept(*scheduled);
  Json json;
  json["id"] = id;
  json["ready"] = live.has_value();
  if (live) {
    json["layers"] = live->num_layers;
    json["kv_heads"] = live->num_kv_heads;
    json["tokens"] = live->num_tokens;
    json["kept_share"] = live->kept_share;
  }
  response.set_content(dump(json), kJson);
}

}  // namespace twilight::server
