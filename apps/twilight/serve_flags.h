#ifndef TWILIGHT_APPS_SERVE_FLAGS_H_
#define TWILIGHT_APPS_SERVE_FLAGS_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "flags.h"
#include "server/api_server.h"
#include "server/scheduler.h"

namespace twilight::app {

/// What it takes to serve a model.
struct ServeFlags {
  CommonFlags common;
  AttentionFlags attention;
  std::string model, model_id, api_key, api_key_file;
  server::ServerOptions server;
  std::int32_t max_seqs = 16, max_queue = 1024, prefill_tokens = 256;
  std::int32_t context = 0;
  std::int64_t cache_tokens = 0;
  bool no_prefix_cache = false;
  double timeout = 0, read_timeout = 30, write_timeout = 30;
  double max_body_mib = 8;

  void add(CLI::App& command);
  /// The part that shapes the scheduler.
  void add_batching(CLI::App& command);
  [[nodiscard]] server::SchedulerOptions scheduler_options() const;
  [[nodiscard]] server::ServerOptions server_options() const;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_SERVE_FLAGS_H_
