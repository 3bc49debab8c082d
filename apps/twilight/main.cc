#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "commands.h"
#include "interrupt.h"
#include "twilight/error.h"

namespace {

// Exit status: 0 done, 1 an error while running, 2 a mistake on the command line, 130 interrupted.
constexpr int kRuntimeError = 1;
constexpr int kUsageError = 2;

int report(const char* message, int status) {
  std::fprintf(stderr, "twilight: %s\n", message);
  return status;
}

// What is wrong with the command line; the parser's own text where that names value and choice.
std::string usage_message(const CLI::App& app, const CLI::ParseError& error) {
  std::string text = error.what();
  if (error.get_name() == "ConversionError") text += ", accepted a number";
  if (error.get_name() != "RequiredError") return text;
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) command = command->get_subcommands().front();
  std::string accepted;
  for (const CLI::App* each : command->get_subcommands([](const CLI::App*) { return true; })) {
    if (each->get_name().empty()) continue;  // a group of options
    accepted += (accepted.empty() ? "" : ", ") + each->get_name();
  }
  if (accepted.empty()) return text;
  const std::vector<std::string> rest = command->remaining();
  return "[command] " + std::string(rest.empty() ? "none" : "unknown command") + ", got " +
         (rest.empty() ? "nothing" : "'" + rest.front() + "'") + ", accepted " + accepted;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace twilight::app;
  CLI::App app("Long-context decoding that reads only the KV cache that matters.", "twilight");
  app.set_version_flag("--version", "twilight " TWILIGHT_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Action action;
  add_demo(app, action);
  add_generate(app, action);
  add_eval(app, action);
  add_pareto(app, action);
  add_calibrate(app, action);
  add_bench(app, action);
  add_inspect(app, action);
  add_serve(app, action);
  add_info(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return report((usage_message(app, error) + "; see --help").c_str(), kUsageError);
  }
  catch_interrupts();
  try {
    const int status = action();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      return report("[output] cannot write all of standard output", kRuntimeError);
    }
    return status;
  } catch (const twilight::Error& error) {
    const bool usage = error.code() == twilight::ErrorCode::kInvalidArgument;
    return report(error.what(), usage ? kUsageError : kRuntimeError);
  } catch (const std::bad_alloc&) {
    return report("[memory] the system has no memory left for this", kRuntimeError);
  } catch (const std::exception& error) {
    return report(error.what(), kRuntimeError);
  }
}
