#include "server/api_server.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cmath>
#include <ctime>
#include <map>
#include <mutex>
#include <random>
#include <string_view>
#include <utility>

#include "server/api_request.h"
#include "server/generation.h"
#include "server/json_fields.h"
#include "server/metrics.h"
#include "server/page.h"
#include "server/rate_limit.h"
#include "server/responses.h"
#include "twilight/error.h"

namespace twilight::server {
namespace {

constexpr std::chrono::milliseconds kGonePoll{100};
constexpr const char* kJson = "application/json";

// Takes the same time wherever two keys of one length differ.
bool same_key(std::string_view given, std::string_view wanted) {
  unsigned differs = given.size() == wanted.size() ? 0 : 1;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const char against = wanted.empty() ? '\0' : wanted[i % wanted.size()];
    differs |= static_cast<unsigned char>(given[i]) ^ static_cast<unsigned char>(against);
  }
  return differs == 0;
}

std::string random_hex() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(random()));
  return text.data();
}

std::int32_t context_of(const Scheduler& scheduler) {
  const EngineOptions& engine = scheduler.options().engine;
  const std::int32_t context =
      engine.max_context > 0 ? engine.max_context : scheduler.model().info().max_context;
  return engine.cache_tokens > 0
             ? static_cast<std::int32_t>(std::min<std::int64_t>(context, engine.cache_tokens))
             : context;
}

// A request's body, at most `limit` bytes after decompression.
std::string read_body(const httplib::ContentReader& reader, std::size_t limit) {
  std::string body;
  bool over = false;
  const bool ok = reader([&](const char* data, std::size_t size) {
    over = body.size() + size > limit;
    if (!over) body.append(data, size);
    return !over;
  });
  if (over || !ok) {
    if (Connection* connection = Connection::current()) connection->close_after();
  }
  if (over) {
    throw ApiError(413, "body, got more than " + std::to_string(limit) + " bytes", "too_large");
  }
  if (!ok) throw ApiError(400, "the body did not arrive whole", "incomplete_body");
  return body;
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

struct ApiServer::Impl {
  Impl(Scheduler& to, ServerOptions given, std::FILE* log_file)
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
      response.set_content(
          dump(ApiError(response.status, "malformed request", "bad_request").body()), kJson);
    });
  }

  /// Whether a request goes on to its handler; else `response` is filled.
  bool admit(const httplib::Request& request, httplib::Response& response) {
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

  static ApiError shutting_down() {
    return ApiError(503, "the server is shutting down", "shutdown").retry_after(1);
  }

  void check_key(const httplib::Request& request) const {
    const std::string given = request.get_header_value("Authorization");
    constexpr std::string_view kBearer = "Bearer ";
    const bool bearer = std::string_view(given).starts_with(kBearer);
    if (!bearer || !same_key(std::string_view(given).substr(kBearer.size()), options.api_key)) {
      throw ApiError(401, bearer ? "wrong API key" : "no API key given, accepted Bearer KEY",
                     "invalid_api_key");
    }
  }

  void check_length(const httplib::Request& request) const {
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

  void refuse(const httplib::Request& request, httplib::Response& response, const ApiError& error) {
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

  template <typename Work>
  void guarded(const httplib::Request& request, httplib::Response& response, const Work& work) {
    try {
      work();
    } catch (const ApiError& error) {
      refuse(request, response, error);
    } catch (const std::bad_alloc&) {
      refuse(request, response, ApiError(503, "no memory left for this request", "out_of_memory"));
    } catch (const std::exception& error) {
      refuse(request, response, ApiError(500, error.what(), "internal_error"));
    }
  }

  RequestContext request_context() const {
    RequestContext context;
    context.model = &scheduler.model();
    context.chat = chat.get();
    context.model_id = options.model_id;
    context.policy = scheduler.options().engine.policy;
    context.context = context_tokens;
    context.max_prompt = options.max_prompt;
    context.max_choices = options.max_choices;
    context.default_seed = std::random_device{}();
    return context;
  }

  /// One API request from its submission to its log line.
  struct Job {
    Impl& server;
    ResponseHead head;
    std::string client;
    Clock::time_point start = Clock::now();
    Generation generation;
    bool closed = false;

    Job(Impl& to, ResponseHead with, std::string from, ApiRequest request,
        const GenerationOptions& how)
        : server(to),
          head(std::move(with)),
          client(std::move(from)),
          generation(to.scheduler, std::move(request), how) {
      const std::lock_guard lock(server.jobs_mutex);
      server.jobs[head.id] = generation.ids();
    }
    ~Job() { close(499, "client_gone"); }

    /// Counts and logs it, once; ends what still runs.
    void close(int status, std::string outcome) {
      if (std::exchange(closed, true)) return;
      if (generation.too_slow()) {
        outcome = "slow_reader";
        server.metrics.slow_reader();
      }
      generation.cancel();
      {
        const std::lock_guard lock(server.jobs_mutex);
        server.jobs.erase(head.id);
      }
      server.finish(*this, status, outcome);
    }
  };

  void finish(const Job& job, int status, const std::string& outcome) {
    const Generation& generation = job.generation;
    double queue = 0, first = 0;
    for (const ChoiceState& choice : generation.choices()) {
      if (!choice.end) continue;
      metrics.choice_ended(choice.end->reason, choice.end->usage);
      queue = std::max(queue, choice.end->usage.queue_seconds);
      first = std::max(first, choice.end->usage.first_token_seconds);
    }
    metrics.responded(job.head.chat ? "chat" : "completions", status);
    const Json usage = usage_json(generation.choices(), generation.request().n);
    Json fields;
    fields["id"] = job.head.id;
    fields["client"] = job.client;
    fields["status"] = status;
    fields["outcome"] = outcome;
    fields["stream"] = generation.request().stream;
    fields["choices"] = generation.choices().size();
    fields["prompt_tokens"] = usage["prompt_tokens"];
    fields["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"];
    fields["completion_tokens"] = usage["completion_tokens"];
    const auto milli = [](double seconds) { return std::round(seconds * 1e6) / 1e3; };
    fields["queue_ms"] = milli(queue);
    fields["first_token_ms"] = milli(first);
    fields["total_ms"] = milli(seconds_since(job.start));
    fields["kv_bytes_ratio"] = std::round(usage["kv_bytes_ratio"].get<double>() * 1e4) / 1e4;
    fields["kept_tokens_mean"] = usage["kept_tokens_mean"];
    log.write(status >= 500 ? LogLevel::kWarning : LogLevel::kInfo, "request", fields);
  }

  void generate(const httplib::Request& request, httplib::Response& response,
                const httplib::ContentReader& reader, bool is_chat) {
    const Json body = parse_body(read_body(reader, options.max_body));
    const RequestContext context = request_context();
    ApiRequest parsed = is_chat ? parse_chat(body, context) : parse_completion(body, context);
    ResponseHead head;
    head.id = (is_chat ? "chatcmpl-" : "cmpl-") + random_hex();
    head.model = options.model_id;
    head.created = std::time(nullptr);
    head.chat = is_chat;
    GenerationOptions how;
    how.client = request.remote_addr;
    how.timeout = options.timeout;
    how.stream_events = options.stream_events;
    how.strip_leading = is_chat && chat->strips_leading();
    const bool streams = parsed.stream;
    std::shared_ptr<Job> job;
    try {
      job = std::make_shared<Job>(*this, head, request.remote_addr, std::move(parsed), how);
    } catch (const ApiError& error) {
      if (error.code() == "queue_full" && draining) throw shutting_down();
      throw;
    }
    response.set_header("X-Request-Id", head.id);
    if (streams) return stream(response, std::move(job));
    answer(response, *job);
  }

  void answer(httplib::Response& response, Job& job) {
    Generation& generation = job.generation;
    while (!generation.done()) {
      (void)generation.next(kGonePoll);
      const Connection* connection = Connection::current();
      if (connection != nullptr && connection->client_gone()) {
        job.close(499, "client_gone");
        response.status = 499;
        return;
      }
    }
    for (const ChoiceState& choice : generation.choices()) {
      if (const auto error = failure(*choice.end)) {
        job.close(error->status(), error->code());
        throw *error;
      }
    }
    const ApiRequest& request = generation.request();
    response.set_content(
        dump(response_json(job.head, generation.choices(), request.n, request.logprobs)), kJson);
    job.close(200, "ok");
  }

  void stream(httplib::Response& response, std::shared_ptr<Job> job) {
    response.set_header("Cache-Control", "no-cache");
    response.set_header("X-Accel-Buffering", "no");
    response.set_chunked_content_provider(
        "text/event-stream",
        [this, job](std::size_t /*offset*/, httplib::DataSink& sink) { return pump(*job, sink); },
        [job](bool /*success*/) { job->close(499, "client_gone"); });
  }

  /// Writes what has come; false: the connection is given up.
  bool pump(Job& job, httplib::DataSink& sink) {
    Generation& generation = job.generation;
    const auto send = [&](const std::string& text) { return sink.write(text.data(), text.size()); };
    const std::optional<ChoiceEvent> event = generation.next(kGonePoll);
    if (generation.too_slow()) return false;
    if (!event) return Connection::current() == nullptr || !Connection::current()->client_gone();
    ChoiceState& choice = generation.choices()[static_cast<std::size_t>(event->choice)];
    const ApiRequest& request = generation.request();
    std::string text;
    const bool first = !std::exchange(choice.begun, true);
    if (!event->text.empty() || !event->tokens.empty() || (first && job.head.chat)) {
      text += sse(piece_json(job.head, *event, first, request.logprobs));
    }
    std::string outcome = "ok";
    if (event->end) {
      if (const auto error = failure(*event->end)) {
        text += sse(error->body());
        outcome = error->code();
      } else {
        text += sse(end_json(job.head, event->choice, finish_reason(*event->end)));
      }
    }
    if (!generation.done()) return text.empty() || send(text);
    if (request.include_usage) {
      text += sse(usage_piece_json(job.head, usage_json(generation.choices(), request.n)));
    }
    text += "data: [DONE]\n\n";
    if (!send(text)) return false;
    sink.done();
    job.close(200, outcome);
    return true;
  }

  Json model_json() const {
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

  void models(const httplib::Request& /*request*/, httplib::Response& response) {
    Json json;
    json["object"] = "list";
    json["data"] = Json::array({model_json()});
    response.set_content(dump(json), kJson);
  }

  void one_model(const httplib::Request& request, httplib::Response& response) {
    const std::string id = request.path.substr(std::string_view("/v1/models/").size());
    if (id != options.model_id) {
      throw ApiError(404,
                     "no such model, got " + shown(Json(id)) + ", accepted " + options.model_id,
                     "model_not_found", "model");
    }
    response.set_content(dump(model_json()), kJson);
  }

  void health(const httplib::Request& /*request*/, httplib::Response& response) {
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

  void show_metrics(const httplib::Request& /*request*/, httplib::Response& response) {
    response.set_content(metrics.text(), "text/plain; version=0.0.4");
  }

  void page(const httplib::Request& /*request*/, httplib::Response& response) {
    response.set_header("Content-Security-Policy",
                        "default-src 'none'; style-src 'unsafe-inline'; script-src "
                        "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'");
    response.set_content(kPage.data(), kPage.size(), "text/html; charset=utf-8");
  }

  void kept(const httplib::Request& request, httplib::Response& response) {
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

  Scheduler& scheduler;
  ServerOptions options;
  Log log;
  Metrics metrics;
  RateLimit limit;
  std::unique_ptr<ChatFormat> chat;
  HttpServer http;
  std::int32_t context_tokens;
  std::atomic<bool> draining{false};
  Clock::time_point started = Clock::now();
  std::int64_t started_at = std::time(nullptr);
  std::mutex jobs_mutex;
  std::map<std::string, std::vector<Scheduler::Id>> jobs;
};

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
