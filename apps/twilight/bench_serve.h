#ifndef TWILIGHT_APPS_BENCH_SERVE_H_
#define TWILIGHT_APPS_BENCH_SERVE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bench_common.h"
#include "load_run.h"
#include "serve_flags.h"

namespace twilight::app {

struct ServeBenchFlags {
  BenchFlags bench;  ///< attention: a list; empty with `url`: what the server uses by itself
  ServeFlags own;    ///< batching of a server of our own
  std::string model;
  std::string text;  ///< empty: the bundled one
  std::string url, api_key_file;
  std::string prompt_tokens = "256:32768", output_tokens = "32:256";
  double rate = 0;
  double timeout = 600;
  LoadLimits limits;
  std::int32_t documents = 0, rounds = 1;
  std::uint64_t seed = 1;
};

/// What the server said of itself over one pass.
struct ServerCounts {
  bool known = false;  ///< has these metrics
  bool idle = false;   ///< nothing ran when the pages were counted
  double kv_bytes_read = 0, kv_bytes_dense = 0, preemptions = 0, decode_steps = 0;
  std::int64_t pages_total = 0, pages_free = 0, pages_cached = 0;

  /// Pages that nothing accounts for; nothing where that cannot be told.
  [[nodiscard]] std::int64_t pages_lost() const {
    return known && idle ? pages_total - pages_free - pages_cached : 0;
  }
};

/// Everything measured with one attention setting.
struct ServeRun {
  std::string name;  ///< of the setting
  nlohmann::ordered_json policy;
  std::vector<LoadResult> results;  ///< of all rounds, one after another on one clock
  std::vector<LoadSummary> rounds;
  std::vector<ServerCounts> counts;  ///< a round each
};

struct ServeReport {
  std::string device, model, server;
  std::int32_t context = 0;
  double load_before = 0, load_after = 0;
  bool interrupted = false;
  std::vector<ServeRun> runs;
};

[[nodiscard]] nlohmann::ordered_json serve_report_json(const ServeBenchFlags& flags,
                                                       const ServeReport& report);
void print_serve_report(const ServeBenchFlags& flags, const ServeReport& report);

/// Drives a server over HTTP under each attention setting; returns the exit status.
int run_bench_serve(const ServeBenchFlags& flags);
void add_bench_serve(CLI::App& bench, std::function<int()>& action);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_BENCH_SERVE_H_
