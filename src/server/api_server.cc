#include "server/api_server.h"

#include <algorithm>
#include <utility>

#include "server/api_server_impl.h"

namespace twilight::server {
namespace {

std::int32_t context_of(const Scheduler& scheduler) {
  const EngineOptions& engine = scheduler.options().engine;
  const std::int32_t context =
      engine.max_context > 0 ? engine.max_context : scheduler.model().info().max_context;
  return engine.cache_tokens > 0
             ? static_cast<std::int32_t>(std::min<std::int64_t>(context, engine.cache_tokens))
             : context;
}

}  // namespace

ApiServer::Impl::Impl(Scheduler& to, ServerOptions given, std::FILE* log_file)
    : scheduler(to),
      options(std::move(given)),
      log(log_file, options.log_level, options.log_json),
      metrics(to),
      limit(options.rate, options.burst),
      chat(chat_format_of(to.model())),
      http(options.http),
      context_tokens(context_of(to)) {
  using httplib::Request, httplib::Response;
  http.set_pre_routing_handler([this](const Request& request, Response& response) {
    return admit(request, response) ? httplib::Server::HandlerResponse::Unhandled
                                    : httplib::Server::HandlerResponse::Handled;
  });
  const auto post = [this](const char* path, bool is_chat) {
    http.Post(path, [this, is_chat](const Request& request, Response& response,
                                    const httplib::ContentReader& reader) {
      guarded(request, response, [&] { generate(request, response, reader, is_chat); });
    });
  };
  post("/v1/completions", false);
  post("/v1/chat/completions", true);
  const auto get = [this](const char* path, void (Impl::*handler)(const Request&, Response&)) {
    http.Get(path, [this, handler](const Request& request, Response& response) {
      guarded(request, response, [&] { (this->*handler)(request, response); });
    });
  };
  get("/v1/models", &Impl::models);
  get("/v1/models/(.+)", &Impl::one_model);
  get("/v1/twilight/kept", &Impl::kept);
  get("/health", &Impl::health);
  get("/metrics", &Impl::show_metrics);
  get("/", &Impl::page);
  http.set_error_handler([](const Request&, Response& response) {
    if (!response.body.empty()) return;
    if (Connection* connection = Connection::current()) connection->close_after();
    response.set_content(dump(ApiError(response.status, "malformed request", "bad_request").body()),
                         kJson);
  });
}

ApiServer::ApiServer(Scheduler& scheduler, ServerOptions options, std::FILE* log)
    : impl_(std::make_unique<Impl>(scheduler, std::move(options), log)) {}

ApiServer::~ApiServer() { shutdown(std::chrono::milliseconds(0)); }

void ApiServer::start() { impl_->http.start(); }

int ApiServer::port() const { return impl_->http.port(); }

void ApiServer::shutdown(std::chrono::milliseconds grace) {
  if (impl_->draining.exchange(true)) return;
  impl_->scheduler.shutdown(grace);
  impl_->http.stop();
}

}  // namespace twilight::server
