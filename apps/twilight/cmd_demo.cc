#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "chart.h"
#include "commands.h"
#include "flags.h"
#include "interrupt.h"
#include "passkey.h"
#include "paths.h"
#include "progress.h"
#include "real_range.h"
#include "stats_json.h"
#include "telemetry.h"

namespace twilight::app {
namespace {

struct DemoFlags {
  CommonFlags common;
  AttentionFlags attention;
  std::string model, text;
  std::int32_t context = 20480;
  double depth = -1;
  std::uint64_t seed = 0;
  bool seed_given = false;
  std::int32_t tokens = 64;
  std::int32_t audit_every = 0;
};

constexpr std::int32_t kAnswerTokens = 10;

struct Outcome {
  std::string answer;
  bool found = false;
  double tokens_per_second = 0;
  DecodeTotals totals;
  Telemetry telemetry;
  std::vector<BudgetRecorder::Layer> layers;
};

// The answer, and then more tokens so that the speed rests on enough steps; the text after the
// answer is shown to no one.
Outcome run_policy(Engine& engine, const Sequence& prompt, std::span<const float> logits,
                   const SparsePolicy& policy, const PasskeyTask& task, std::int32_t tokens,
                   std::int32_t audit_every) {
  engine.set_policy(policy);
  engine.reset_totals();
  Sequence sequence = prompt.fork();
  BudgetRecorder recorder(engine.model().info().num_layers);
  GenerateOptions options;
  options.max_tokens = tokens;
  options.stop_at_eos = false;
  options.on_token = [](std::int32_t) { return !interrupted(); };
  StepAudit audit(engine, audit_every);
  options.on_step = [&] {
    recorder.record(engine);
    audit.after_step();
  };
  const GenerateResult result = generate(engine, sequence, logits, options);
  Outcome outcome;
  std::string text = engine.model().decode(result.tokens);
  outcome.found = answers(task, text);
  text = text.substr(0, text.find('\n'));
  outcome.answer =
      text.substr(0, text.find('.') == std::string::npos ? text.size() : text.find('.') + 1);
  if (!outcome.answer.empty() && outcome.answer.front() == ' ') outcome.answer.erase(0, 1);
  outcome.tokens_per_second = result.decode_steps > 0
                                  ? static_cast<double>(result.decode_steps) / result.decode_seconds
                                  : 0;
  outcome.totals = engine.totals();
  outcome.telemetry = audit.telemetry();
  outcome.layers = recorder.layers();
  return outcome;
}

nlohmann::ordered_json outcome_json(const Outcome& outcome, const SparsePolicy& policy) {
  nlohmann::ordered_json out;
  out["policy"] = policy_json(policy);
  out["answer"] = outcome.answer;
  out["found"] = outcome.found;
  out["decode_tokens_per_second"] = outcome.tokens_per_second;
  out["attention"] = totals_json(outcome.totals);
  out["telemetry"] = outcome.telemetry.report(policy);
  for (const auto& layer : outcome.layers) {
    const Spread s = spread_of(layer.kept);
    out["kept_per_layer"].push_back({{"sparse", layer.sparse},
                                     {"min", s.min},
                                     {"p10", s.p10},
                                     {"mean", s.mean},
                                     {"p90", s.p90},
                                     {"max", s.max}});
  }
  return out;
}

void print_row(const char* name, const std::string& dense, const std::string& sparse) {
  std::printf("  %-28s %20s %20s\n", name, dense.c_str(), sparse.c_str());
}

std::string number(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

int run_demo(const DemoFlags& flags) {
  const SparsePolicy sparse_policy = flags.attention.policy();
  const std::uint64_t seed = flags.seed_given ? flags.seed : std::random_device{}();
  const Device device(flags.common.device);
  const Model model = load_model(flags.model, flags.common, flags.attention);
  const std::string text_path = flags.text.empty() ? bundled_novel() : flags.text;
  Random random(seed);
  const double depth =
      flags.depth >= 0 ? flags.depth : 0.05 + static_cast<double>(random.below(85)) / 100;
  const PasskeyTask task =
      PasskeyBuilder(model, read_text(text_path))
          .make(flags.context, depth, std::max(flags.tokens, kAnswerTokens), random);
  flags.attention.announce(flags.common);
  if (!flags.common.json) {
    std::printf("Model     %s (%s)\n", model.info().path.c_str(), device.description().c_str());
    std::printf("Text      %s\n", text_path.c_str());
    std::printf("Prompt    %zu tokens; hidden at %.0f %% of it: \"%s\"\n", task.prompt.size(),
                depth * 100, task.fact.c_str());
    std::printf("Question  What is the special magic number for %s?\n", task.key.c_str());
    std::printf("Seed      %llu\n\n", static_cast<unsigned long long>(seed));
    std::fflush(stdout);
  }
  EngineOptions options;
  options.policy = sparse_policy;
  options.page_size = flags.attention.page_size();
  options.max_context = flags.context;
  // The two answers fork from one prompt and need room of their own.
  options.cache_tokens = flags.context + 2 * (flags.tokens + options.page_size);
  Engine engine(device, model, options);
  Sequence prompt = engine.cache().new_sequence();
  std::vector<float> logits(static_cast<std::size_t>(model.info().vocab_size));
  const auto start = std::chrono::steady_clock::now();
  {
    ProgressBar bar("Reading the prompt", "tokens", !flags.common.json);
    if (engine.prefill(prompt, task.prompt, logits, bar.callback()) == Engine::Status::kCancelled) {
      return kInterruptedExit;
    }
  }
  const double prefill_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const Outcome dense =
      run_policy(engine, prompt, logits, make_policy("dense"), task, flags.tokens, 0);
  const Outcome sparse =
      run_policy(engine, prompt, logits, sparse_policy, task, flags.tokens, flags.audit_every);
  if (interrupted()) return kInterruptedExit;
  const double ratio =
      dense.tokens_per_second > 0 ? sparse.tokens_per_second / dense.tokens_per_second : 0;
  if (flags.common.json) {
    nlohmann::ordered_json report;
    report["model"] = model.info().path;
    report["text"] = text_path;
    report["device"] = device.description();
    report["seed"] = seed;
    report["prompt_tokens"] = task.prompt.size();
    flags.attention.report(report);
    report["depth"] = depth;
    report["fact"] = task.fact;
    report["prefill_seconds"] = prefill_seconds;
    report["dense"] = outcome_json(dense, make_policy("dense"));
    report["sparse"] = outcome_json(sparse, engine.policy());
    report["decode_speedup"] = ratio;
    std::printf("%s\n",
                report.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::printf("Prompt read in %.1f s (%.0f tokens/s, dense)\n\n", prefill_seconds,
                static_cast<double>(task.prompt.size()) / prefill_seconds);
    print_row("", "dense", "twilight (" + sparse_policy.name + ")");
    print_row("answer", dense.answer, sparse.answer);
    print_row("correct", dense.found ? "yes" : "no", sparse.found ? "yes" : "no");
    print_row("decode, tokens/s", number("%.1f", dense.tokens_per_second),
              number("%.1f", sparse.tokens_per_second) + number(" (%.2fx)", ratio));
    print_row("KV bytes read", "100 %", number("%.1f %%", sparse.totals.bytes_ratio() * 100));
    print_row("  in the sparse layers", "100 %",
              number("%.1f %%", sparse.totals.sparse_bytes_ratio() * 100));
    std::printf("\n%s", budget_chart(sparse.layers).c_str());
    const std::string line = sparse.telemetry.line(engine.policy());
    if (!line.empty()) std::printf("\n%s\n", line.c_str());
  }
  return dense.found && sparse.found ? 0 : 1;
}

}  // namespace

void add_demo(CLI::App& app, Action& action) {
  auto flags = std::make_shared<DemoFlags>();
  CLI::App* command = app.add_subcommand(
      "demo", "Hide a fact in a novel and find it twice: with dense attention and with Twilight");
  command->footer(
      "Example: twilight demo --ctx 32768\nExit status 0 if both found the fact, else 1.");
  flags->common.add(*command);
  flags->attention.add(*command);
  flags->attention.add_model_profile(*command);
  command->add_option("--model", flags->model,
                      "Checkpoint folder or GGUF file; the bundled model by default");
  command->add_option("--text", flags->text,
                      "Text to hide the fact in; the bundled novel by default");
  command->add_option("--ctx", flags->context, "Tokens of the whole context")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--depth", flags->depth, "Where to hide it, 0 to 1; drawn by default")
      ->check(real_range(0.0, 1.0));
  command->add_option("--tokens", flags->tokens, "Tokens to decode each time")
      ->capture_default_str()
      ->check(CLI::Range(kAnswerTokens, 1 << 20));
  command
      ->add_option("--audit-every", flags->audit_every,
                   "Measure the true kept mass, which slows the steps it is done in, in one step "
                   "of this many; 0 never")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  auto* seed = command->add_option("--seed", flags->seed, "Draw the same fact again")
                   ->check(CLI::NonNegativeNumber);
  command->callback([flags, seed, &action] {
    flags->seed_given = seed->count() > 0;
    action = [flags] {
      if (flags->model.empty()) flags->model = bundled_model();
      flags->attention.settle(flags->model);
      return run_demo(*flags);
    };
  });
}

}  // namespace twilight::app
