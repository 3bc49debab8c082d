#ifndef TWILIGHT_APPS_COMMANDS_H_
#define TWILIGHT_APPS_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <functional>

namespace twilight::app {

/// What main runs after parsing; returns the exit status.
using Action = std::function<int()>;

// Each adds its subcommand to `app` and sets `action` when that subcommand was given.
void add_demo(CLI::App& app, Action& action);
void add_generate(CLI::App& app, Action& action);
void add_eval(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_pareto(CLI::App& app, Action& action);
void add_calibrate(CLI::App& app, Action& action);
void add_inspect(CLI::App& app, Action& action);
void add_serve(CLI::App& app, Action& action);
void add_info(CLI::App& app, Action& action);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_COMMANDS_H_
