#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <random>
#include <utility>

#include "server/api_server_impl.h"

namespace twilight::server {
namespace {

constexpr std::chrono::milliseconds kGonePoll{100};

std::string random_hex() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(random()));
  return text.data();
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

}  // namespace

RequestContext ApiServer::Impl::request_context() const {
  RequestContext context;
  context.model = &scheduler.model();
  context.chat = chat.get();
  context.model_id = options.model_id;
  context.policy = scheduler.options().engine.policy;
  context.serves = [this](const SparsePolicy& policy) { return scheduler.serves(policy); };
  context.context = context_tokens;
  context.max_prompt = options.max_prompt;
  context.max_choices = options.max_choices;
  context.default_seed = std::random_device{}();
  return context;
}

ApiServer::Impl::Job::Job(Impl& to, ResponseHead with, std::string from, ApiRequest request,
                          const GenerationOptions& how)
    : server(to),
      head(std::move(with)),
      client(std::move(from)),
      generation(to.scheduler, std::move(request), how) {
  const std::lock_guard lock(server.jobs_mutex);
  server.jobs[head.id] = generation.ids();
}

void ApiServer::Impl::Job::close(int status, std::string outcome) {
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

void ApiServer::Impl::finish(const Job& job, int status, const std::string& outcome) {
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

void ApiServer::Impl::generate(const httplib::Request& request, httplib::Response& response,
                               const httplib::ContentReader& reader, bool is_chat) {
  const Json body = parse_body(read_body(reader, options.max_body));
  const RequestContext context = request_context();
  ApiRequest parsed = is_chat ? parse_chat(body, context) : parse_completion(body, context);
  ResponseHead head;
  head.id = (is_chat ? "chatcmpl-" : "cmpl-") + random_hex();
  head.model = options.model_id;
  head.created = std::time(nullptr);
  head.chat = is_chat;
  head.usage = parsed.include_usage;
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
  if (streams) return stream(response, job);
  answer(response, *job);
}

void ApiServer::Impl::answer(httplib::Response& response, Job& job) {
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

void ApiServer::Impl::stream(httplib::Response& response, const std::shared_ptr<Job>& job) {
  response.set_header("Cache-Control", "no-cache");
  response.set_header("X-Accel-Buffering", "no");
  response.set_chunked_content_provider(
      "text/event-stream",
      [this, job](std::size_t /*offset*/, httplib::DataSink& sink) { return pump(*job, sink); },
      [job](bool /*success*/) { job->close(499, "client_gone"); });
}

// Writes what has come; false: the connection is given up.
bool ApiServer::Impl::pump(Job& job, httplib::DataSink& sink) {
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

}  // namespace twilight::server
