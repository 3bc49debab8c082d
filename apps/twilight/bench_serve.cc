#include "bench_serve.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <sstream>
#include <thread>
#include <utility>

#include "interrupt.h"
#include "output.h"
#include "paths.h"
#include "progress.h"
#include "stats_json.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr std::chrono::seconds kIdlePatience{10};

/// A server on a free port of this machine, gone with the object.
class OwnServer {
 public:
  OwnServer(const ServeBenchFlags& flags, const Device& device, const Model& model,
            const SparsePolicy& policy)
      : scheduler_(device, model, scheduling(flags, policy)),
        server_(scheduler_, options(flags), stderr) {
    server_.start();
  }
  ~OwnServer() { server_.shutdown(std::chrono::milliseconds(0)); }
  OwnServer(const OwnServer&) = delete;
  OwnServer& operator=(const OwnServer&) = delete;

  [[nodiscard]] std::string url() const {
    return "http://127.0.0.1:" + std::to_string(server_.port());
  }
  /// As the engine settled it.
  [[nodiscard]] const SparsePolicy& policy() const { return scheduler_.options().engine.policy; }

 private:
  static server::SchedulerOptions scheduling(const ServeBenchFlags& flags,
                                             const SparsePolicy& policy) {
    server::SchedulerOptions options = flags.own.scheduler_options();
    options.engine.policy = policy;
    options.engine.page_size = flags.bench.attention.page_size();
    return options;
  }
  static server::ServerOptions options(const ServeBenchFlags& flags) {
    server::ServerOptions options;
    options.version = TWILIGHT_VERSION;
    options.model_id = "model";
    options.http.port = 0;
    options.http.max_connections = std::max(256, 2 * flags.limits.streams);
    options.log_level = server::log_level("off");
    return options;
  }

  server::Scheduler scheduler_;
  server::ApiServer server_;
};

std::vector<std::string> names_of(const std::string& list) {
  std::vector<std::string> names;
  std::istringstream parts(list);
  for (std::string name; std::getline(parts, name, ',');) {
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  if (names.empty()) names.emplace_back();
  return names;
}

double value(const std::map<std::string, double>& metrics, const std::string& name) {
  const auto found = metrics.find("twilight_" + name);
  return found == metrics.end() ? 0 : found->second;
}

bool busy(const std::map<std::string, double>& metrics) {
  return value(metrics, "requests_running") + value(metrics, "requests_prefilling") +
             value(metrics, "requests_queued") >
         0;
}

// The server's counters since `before`, once nothing runs any more.
ServerCounts count_since(LoadClient& client, const std::map<std::string, double>& before) {
  ServerCounts counts;
  if (before.empty()) return counts;
  const auto until = LoadClient::Clock::now() + kIdlePatience;
  std::map<std::string, double> after = client.metrics();
  while (busy(after) && LoadClient::Clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    after = client.metrics();
  }
  const auto more = [&](const char* name) { return value(after, name) - value(before, name); };
  counts.known = after.count("twilight_pages_total") > 0;
  counts.idle = !busy(after);
  counts.kv_bytes_read = more("kv_bytes_read_total");
  counts.kv_bytes_dense = more("kv_bytes_dense_total");
  counts.preemptions = more("preemptions_total");
  counts.decode_steps = more("decode_steps_total");
  counts.pages_total = static_cast<std::int64_t>(value(after, "pages_total"));
  counts.pages_free = static_cast<std::int64_t>(value(after, "pages_free"));
  counts.pages_cached = static_cast<std::int64_t>(value(after, "pages_cached"));
  return counts;
}

/// The passes of every setting over one server each, or over the one at --url.
class ServeBench {
 public:
  ServeBench(const ServeBenchFlags& flags, std::vector<std::string> names)
      : flags_(flags), own_(flags.url.empty()) {
    shape_.prompt = Lengths::parse("--prompt-tokens", flags.prompt_tokens);
    shape_.output = Lengths::parse("--output-tokens", flags.output_tokens);
    shape_.rate = flags.rate;
    shape_.documents = flags.documents;
    shape_.seed = flags.seed;
    for (std::string& name : names) {
      if (own_) policies_.push_back(flags.bench.attention.policy(name));
      report_.runs.emplace_back().name = name.empty() ? "server" : std::move(name);
    }
  }

  void prepare() {
    if (!flags_.api_key_file.empty()) {
      std::istringstream(read_text(flags_.api_key_file)) >> api_key_;
    }
    if (!own_) entry_ = client(flags_.url)->model();
    const std::string text_path = flags_.text.empty() ? bundled_novel() : flags_.text;
    const std::string text = read_text(text_path);
    if (own_) device_.emplace(flags_.bench.common.device);
    model_ = load_model(flags_.model, flags_.bench.common, flags_.bench.attention);
    const ModelInfo& info = model_->info();
    std::vector<std::int32_t> first;
    if (info.bos_token) first.push_back(*info.bos_token);
    text_.emplace(model_->encode(text, false), first);
    report_.device = own_ ? device_->description() : "";
    report_.server = own_ ? "in this process" : flags_.url;
    report_.model = own_
                        ? std::filesystem::path(flags_.model).lexically_normal().filename().string()
                        : entry_.id;
    report_.context = info.max_context;
    if (own_) {
      const EngineOptions engine = flags_.own.scheduler_options().engine;
      if (engine.max_context > 0) report_.context = engine.max_context;
      report_.context =
          static_cast<std::int32_t>(std::min<std::int64_t>(report_.context, engine.cache_tokens));
    } else if (entry_.context > 0) {
      report_.context = static_cast<std::int32_t>(entry_.context);
    }
    shape_.context = report_.context;
    (void)LoadSource(shape_);  // refuses lengths that do not fit
  }

  void run() {
    report_.load_before = load_average();
    for (std::int32_t round = 0; round < flags_.rounds; ++round) {
      for (std::size_t i = 0; i < report_.runs.size() && !interrupted(); ++i) pass(i);
    }
    report_.load_after = load_average();
    report_.interrupted = interrupted();
  }

  [[nodiscard]] const ServeReport& report() const { return report_; }

 private:
  [[nodiscard]] std::unique_ptr<LoadClient> client(const std::string& url) const {
    return std::make_unique<LoadClient>(url, api_key_, flags_.timeout);
  }

  void pass(std::size_t setting) {
    ServeRun& run = report_.runs[setting];
    std::optional<OwnServer> server;
    LoadClient::Extra extra;
    std::vector<std::int32_t> mark;
    if (own_) {
      server.emplace(flags_, *device_, *model_, policies_[setting]);
      run.policy = policy_json(server->policy());
    } else {
      // What an earlier pass left in the server's prefix cache must not help this one.
      const auto time = std::chrono::system_clock::now().time_since_epoch().count();
      mark = model_->encode(std::to_string(time) + ". ", false);
      extra.model = entry_.id;
      if (run.name != "server") extra.attention = run.name;
    }
    const auto to = client(own_ ? server->url() : flags_.url);
    const std::map<std::string, double> before = to->metrics();
    ProgressBar bar("Load, " + run.name, flags_.limits.requests > 0 ? "requests" : "seconds",
                    !flags_.bench.common.json);
    const auto progress = [&](std::int64_t ended, double seconds) {
      if (flags_.limits.requests > 0) {
        bar.update(ended, flags_.limits.requests);
      } else {
        bar.update(static_cast<std::int64_t>(seconds),
                   static_cast<std::int64_t>(flags_.limits.duration) + 1);
      }
    };
    std::vector<LoadResult> results =
        run_load(*to, LoadSource(shape_), *text_, mark, extra, flags_.limits, progress);
    bar.clear();
    run.rounds.push_back(summarize(results));
    run.counts.push_back(count_since(*client(to->url()), before));
    append(run, std::move(results));
  }

  // Rounds follow each other on one clock.
  static void append(ServeRun& run, std::vector<LoadResult> results) {
    double begin = 0;
    for (const LoadResult& result : run.results) begin = std::max(begin, result.done);
    for (LoadResult& result : results) {
      for (double* time : {&result.due, &result.sent, &result.done}) *time += begin;
      for (double& time : result.times) time += begin;
      run.results.push_back(std::move(result));
    }
  }

  const ServeBenchFlags& flags_;
  bool own_;
  std::vector<SparsePolicy> policies_;
  std::string api_key_;
  LoadClient::ModelEntry entry_;
  std::optional<Device> device_;
  std::optional<Model> model_;
  std::optional<LoadText> text_;
  LoadShape shape_;
  ServeReport report_;
};

int exit_status(const ServeReport& report) {
  for (const ServeRun& run : report.runs) {
    const bool lost = std::any_of(run.counts.begin(), run.counts.end(),
                                  [](const ServerCounts& c) { return c.pages_lost() != 0; });
    const bool none = std::none_of(run.results.begin(), run.results.end(),
                                   [](const LoadResult& r) { return r.ok(); });
    if (lost || (none && !report.interrupted)) return 1;
  }
  return report.interrupted ? kInterruptedExit : 0;
}

}  // namespace

int run_bench_serve(const ServeBenchFlags& flags) {
  // A server that hangs up while a request is being sent is one of the load's errors.
  std::signal(SIGPIPE, SIG_IGN);
  ServeBench bench(flags, names_of(flags.bench.attention.attention));
  OutputFile file;
  if (!flags.bench.out.empty()) file = OutputFile(flags.bench.out, flags.bench.force);
  bench.prepare();
  flags.bench.attention.announce(flags.bench.common);
  bench.run();
  const ServeReport& report = bench.report();
  const nlohmann::ordered_json json = serve_report_json(flags, report);
  if (file.is_open()) file.commit(json.dump(1) + "\n");
  if (flags.bench.common.json) {
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    print_serve_report(flags, report);
  }
  return exit_status(report);
}

}  // namespace twilight::app
