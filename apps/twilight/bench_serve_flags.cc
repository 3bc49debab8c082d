#include <memory>

#include "bench_serve.h"
#include "paths.h"
#include "real_range.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr const char* kLoad = "Load";
constexpr const char* kServer = "Server";

void add_load(CLI::App& command, ServeBenchFlags& flags) {
  auto* rate = command
                   .add_option("--rate", flags.rate,
                               "Requests a second, arriving at random (Poisson) whatever is "
                               "under way")
                   ->check(real_range(1e-4, 1e5))
                   ->group(kLoad);
  command
      .add_option("--streams", flags.limits.streams,
                  "Requests under way, each followed by the next; 8 without --rate")
      ->check(CLI::Range(1, 4096))
      ->excludes(rate)
      ->group(kLoad);
  command
      .add_option("--requests", flags.limits.requests, "Requests to send; 64 without --duration")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 40))
      ->group(kLoad);
  command.add_option("--duration", flags.limits.duration, "Seconds in which requests are sent")
      ->check(real_range(0.01, 1e7))
      ->group(kLoad);
  command
      .add_option("--drain", flags.limits.drain,
                  "Seconds after --duration that running requests have before they are cut")
      ->capture_default_str()
      ->check(real_range(0.0, 1e7))
      ->group(kLoad);
  command
      .add_option("--prompt-tokens", flags.prompt_tokens,
                  "Lengths of prompts: N, LOW:HIGH (log-uniform, cut to what the context leaves) "
                  "or a list A,B,C")
      ->capture_default_str()
      ->group(kLoad);
  command
      .add_option("--output-tokens", flags.output_tokens, "Lengths of outputs, in the same forms")
      ->capture_default_str()
      ->group(kLoad);
  command
      .add_option("--documents", flags.documents,
                  "Prompts begin at so many places of the text, so that the prefix cache may help; "
                  "0: anywhere")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20))
      ->group(kLoad);
  command.add_option("--text", flags.text, "Text of the prompts; default: the bundled novel")
      ->group(kLoad);
  command.add_option("--seed", flags.seed, "Seed of arrivals, lengths and places")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber)
      ->group(kLoad);
  command.add_option("--rounds", flags.rounds, "Passes of every attention setting, in turn")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000))
      ->group(kLoad);
  command.add_option("--timeout", flags.timeout, "Seconds one request may take")
      ->capture_default_str()
      ->check(real_range(0.01, 1e6))
      ->group(kLoad);
}

void add_server(CLI::App& command, ServeBenchFlags& flags) {
  auto* url =
      command
          .add_option("--url", flags.url,
                      "A running server, http://HOST:PORT; default: one in this process for "
                      "each setting")
          ->group(kServer);
  command.add_option("--api-key-file", flags.api_key_file, "Key of the server at --url, in a file")
      ->needs(url)
      ->group(kServer);
  command
      .add_option("--model", flags.model,
                  "Checkpoint folder or GGUF file; with --url its tokenizer makes the prompts; "
                  "default: the bundled model")
      ->group(kServer);
  flags.own.add_batching(command);
  // These shape a server of our own.
  for (CLI::Option* option : command.get_options()) {
    const bool attention = option->get_group() == "Attention" && !option->check_lname("attention");
    const bool machine = option->check_lname("threads") || option->check_lname("isa") ||
                         option->check_lname("device");
    if (attention || machine || option->get_group() == "Batching") url->excludes(option);
  }
}

}  // namespace

void add_bench_serve(CLI::App& bench, std::function<int()>& action) {
  auto flags = std::make_shared<ServeBenchFlags>();
  CLI::App* command =
      bench.add_subcommand("serve", "Drive a server over HTTP and time its answers");
  command->footer(
      "Streams completions under every attention setting with the same requests. Ctrl-C ends it "
      "with what was measured.\n"
      "Example: twilight bench serve --streams 64 --prompt-tokens 256:32768 --attention "
      "dense,adaptive\n"
      "Example: twilight bench serve --url http://127.0.0.1:8080 --rate 2 --duration 60");
  flags->bench.add(*command);
  flags->bench.attention.add_model_profile(*command);
  auto* attention = command->get_option("--attention")
                        ->description(
                            "Settings to run in turn, repeated or with commas; default: dense, "
                            "and the model's profile or adaptive; with --url what the server uses "
                            "by itself");
  attention->default_str("");
  add_load(*command, *flags);
  add_server(*command, *flags);
  command->callback([flags, attention, &action] {
    if (flags->rate == 0 && flags->limits.streams == 0) flags->limits.streams = 8;
    if (flags->limits.requests == 0 && flags->limits.duration == 0) flags->limits.requests = 64;

    action = [flags, attention] {
      AttentionFlags& given = flags->bench.attention;
      if (flags->model.empty()) flags->model = bundled_model();
      const bool own = flags->url.empty();
      if (own) given.settle(flags->model);
      if (attention->count() > 0) {
        given.attention = given.list();
      } else {
        given.attention = !own ? "" : given.has_profile() ? "dense,profile" : "dense,adaptive";
      }
      return run_bench_serve(*flags);
    };
  });
}

}  // namespace twilight::app
