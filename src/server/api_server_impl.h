#ifndef TWILIGHT_SERVER_API_SERVER_IMPL_H_
#define TWILIGHT_SERVER_API_SERVER_IMPL_H_

#include <atomic>
#include <ctime>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "server/api_request.h"
#include "server/api_server.h"
#include "server/generation.h"
#include "server/json_fields.h"
#include "server/metrics.h"
#include "server/rate_limit.h"
#include "server/responses.h"

namespace twilight::server {

inline constexpr const char* kJson = "application/json";

struct ApiServer::Impl {
  Impl(Scheduler& to, ServerOptions given, std::FILE* log_file);

  // --- What a request meets first, in api_admission.cc.
  /// Whether a request goes on to its handler; else `response` is filled.
  bool admit(const httplib::Request& request, httplib::Response& response);
  static ApiError shutting_down();
  void check_key(const httplib::Request& request) const;
  void check_length(const httplib::Request& request) const;
  void refuse(const httplib::Request& request, httplib::Response& response, const ApiError& error);

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

  // --- Completions, in api_generate.cc.
  /// One API request from its submission to its log line.
  struct Job {
    Impl& server;
    ResponseHead head;
    std::string client;
    Clock::time_point start = Clock::now();
    Generation generation;
    bool closed = false;

    Job(Impl& to, ResponseHead with, std::string from, ApiRequest request,
        const GenerationOptions& how);
    ~Job() { close(499, "client_gone"); }
    /// Counts and logs it, once; ends what still runs.
    void close(int status, std::string outcome);
  };
  RequestContext request_context() const;
  void finish(const Job& job, int status, const std::string& outcome);
  void generate(const httplib::Request& request, httplib::Response& response,
                const httplib::ContentReader& reader, bool is_chat);
  void answer(httplib::Response& response, Job& job);
  void stream(httplib::Response& response, const std::shared_ptr<Job>& job);
  /// Writes what has come; false: the connection is given up.
  bool pump(Job& job, httplib::DataSink& sink);

  // --- What is read only, in api_views.cc.
  Json model_json() const;
  void models(const httplib::Request& /*request*/, httplib::Response& response);
  void one_model(const httplib::Request& request, httplib::Response& response);
  void health(const httplib::Request& /*request*/, httplib::Response& response);
  void show_metrics(const httplib::Request& /*request*/, httplib::Response& response);
  void page(const httplib::Request& /*request*/, httplib::Response& response);
  void kept(const httplib::Request& request, httplib::Response& response);

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

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_API_SERVER_IMPL_H_
