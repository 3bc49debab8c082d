#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "commands.h"
#include "interrupt.h"
#include "real_range.h"
#include "serve_flags.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

struct ServeCommand {
  ServeFlags serve;
  std::string log_format = "text", log_level = "info";
  double grace = 10;
};

int run_serve(const ServeCommand& flags) {
  server::ServerOptions options = flags.serve.server_options();
  options.log_level = server::log_level(flags.log_level);
  options.log_json = flags.log_format == "json";
  const server::SchedulerOptions scheduling = flags.serve.scheduler_options();
  const Device device(flags.serve.common.device);
  const Model model = load_model(flags.serve.model, flags.serve.common, flags.serve.attention);
  server::Scheduler scheduler(device, model, scheduling);
  server::ApiServer server(scheduler, options, stderr);
  server.start();
  flags.serve.attention.announce(flags.serve.common);
  const std::string address =
      (options.http.host.find(':') == std::string::npos ? options.http.host
                                                        : "[" + options.http.host + "]") +
      ":" + std::to_string(server.port());
  if (flags.serve.common.json) {
    nlohmann::ordered_json started;
    started["url"] = "http://" + address;
    started["port"] = server.port();
    flags.serve.attention.report(started);
    std::printf("%s\n", started.dump().c_str());
  } else {
    std::printf("%s on http://%s (%s)\n", options.model_id.c_str(), address.c_str(),
                device.description().c_str());
  }
  std::fflush(stdout);
  while (!interrupted()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  server.shutdown(std::chrono::milliseconds(static_cast<std::int64_t>(flags.grace * 1000)));
  return 0;
}

}  // namespace

void add_serve(CLI::App& app, Action& action) {
  auto flags = std::make_shared<ServeCommand>();
  CLI::App* command =
      app.add_subcommand("serve", "Serve a model over HTTP, with OpenAI's interface and a page");
  command->footer(
      "Ctrl-C or SIGTERM ends it once running requests have ended, after --grace at the latest.\n"
      "Example: twilight serve --model models/vesper-19m --port 8080");
  flags->serve.add(*command);
  const std::string group = "Server";
  command->add_option("--grace", flags->grace, "Seconds that running requests have at shutdown")
      ->capture_default_str()
      ->check(real_range(0.0, 86400.0))
      ->group(group);
  command->add_option("--log-format", flags->log_format, "text or json, one line a request")
      ->capture_default_str()
      ->check(CLI::IsMember({"text", "json"}))
      ->group(group);
  command->add_option("--log-level", flags->log_level, "debug, info, warning, error or off")
      ->capture_default_str()
      ->group(group);
  command->callback([flags, &action] {
    action = [flags] {
      flags->serve.attention.settle(flags->serve.model);
      return run_serve(*flags);
    };
  });
}

}  // namespace twilight::app
