#ifndef TWILIGHT_SERVER_API_SERVER_H_
#define TWILIGHT_SERVER_API_SERVER_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

#include "server/connection.h"
#include "server/http_server.h"
#include "server/log.h"
#include "server/scheduler.h"

namespace twilight::server {

struct ServerOptions {
  HttpOptions http;
  std::string version;
  std::string model_id;                  ///< what /v1/models calls the model
  std::string api_key;                   ///< empty: none is asked for
  std::size_t max_body = 8 << 20;        ///< bytes, after decompression
  std::int32_t max_prompt = 0;           ///< tokens; 0: the context
  std::int32_t max_choices = 128;        ///< prompts times n of one request
  double rate = 0, burst = 10;           ///< requests a second of one client; 0: any
  std::chrono::milliseconds timeout{0};  ///< for one request; 0: any
  std::size_t stream_events = 1024;      ///< events a slow reader may lie behind
  LogLevel log_level = LogLevel::kInfo;
  bool log_json = false;
};

/// OpenAI's HTTP interface to a scheduler, with health, metrics, live views and a page. Endpoints
/// and limits: docs/server.md.
class ApiServer {
 public:
  /// `scheduler` must outlive this; log lines go to `log`, which is borrowed.
  ApiServer(Scheduler& scheduler, ServerOptions options, std::FILE* log);
  ~ApiServer();
  ApiServer(const ApiServer&) = delete;
  ApiServer& operator=(const ApiServer&) = delete;

  /// Throws Error(kIo) where the address cannot be had.
  void start();
  [[nodiscard]] int port() const;
  /// Refuses new work, lets what runs end for up to `grace`, ends the rest, stops listening.
  void shutdown(std::chrono::milliseconds grace);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_API_SERVER_H_
