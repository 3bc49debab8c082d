#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "flags.h"
#include "interrupt.h"
#include "output.h"
#include "paths.h"
#include "progress.h"
#include "stats_json.h"
#include "telemetry.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

struct GenerateFlags {
  CommonFlags common;
  AttentionFlags attention;
  SamplingFlags sampling;
  std::string model, prompt, prompt_file, stats, system, chat_template;
  std::int32_t max_tokens = 128;
  std::int32_t context = 0;
  std::int32_t audit_every = 0;
  bool ignore_eos = false;
  bool force = false;
  bool chat = false;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string prompt_text(const GenerateFlags& flags) {
  const bool from_file = !flags.prompt_file.empty();
  std::string text = from_file ? read_text(flags.prompt_file) : flags.prompt;
  if (text.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                from_file ? "[prompt] the prompt file is empty, got " + flags.prompt_file +
                                ", accepted at least one character"
                          : std::string("[prompt] the prompt is empty, got '', accepted at least "
                                        "one character"));
  }
  return text;
}

// The prompt as a user's message, for models trained on conversations.
std::string chat_text(const Model& model, const GenerateFlags& flags, const std::string& prompt) {
  std::vector<ChatMessage> messages;
  if (!flags.system.empty()) messages.push_back({"system", flags.system});
  messages.push_back({"user", prompt});
  return model.chat_prompt(messages, true, flags.chat_template);
}

int run_generate(const GenerateFlags& flags) {
  const SparsePolicy policy = flags.attention.policy();
  (void)Sampler(flags.sampling.options);  // refuses bad ones before the long work
  const std::string prompt = prompt_text(flags);
  OutputFile stats_file;
  if (!flags.stats.empty()) stats_file = OutputFile(flags.stats, flags.force);
  const Device device(flags.common.device);
  const Model model = load_model(flags.model, flags.common, flags.attention);
  const std::vector<std::int32_t> tokens =
      flags.chat ? model.encode(chat_text(model, flags, prompt), /*add_bos=*/false)
                 : model.encode(prompt);
  if (flags.context > model.info().max_context) {
    throw Error(ErrorCode::kInvalidArgument,
                "[--ctx] context, got " + std::to_string(flags.context) +
                    " tokens, accepted up to the model's " +
                    std::to_string(model.info().max_context) +
                    (model.info().sliding_window ? ", its sliding window" : ""));
  }
  const std::int32_t limit = flags.context > 0 ? flags.context : model.info().max_context;
  if (static_cast<std::int64_t>(tokens.size()) > limit) {
    throw Error(ErrorCode::kInvalidArgument,
                "[prompt] prompt longer than the context, got " + std::to_string(tokens.size()) +
                    " tokens, accepted up to " + std::to_string(limit));
  }
  EngineOptions options;
  options.policy = policy;
  options.page_size = flags.attention.page_size();
  options.max_context = static_cast<std::int32_t>(
      std::min<std::int64_t>(limit, static_cast<std::int64_t>(tokens.size()) + flags.max_tokens));
  Engine engine(device, model, options);
  Sequence sequence = engine.cache().new_sequence();
  std::vector<float> logits(static_cast<std::size_t>(model.info().vocab_size));

  flags.attention.announce(flags.common);
  const auto prefill_start = std::chrono::steady_clock::now();
  {
    ProgressBar bar("Reading the prompt", "tokens", !flags.common.json);
    if (engine.prefill(sequence, tokens, logits, bar.callback()) == Engine::Status::kCancelled) {
      return kInterruptedExit;
    }
  }
  const double prefill_seconds = seconds_since(prefill_start);

  TextStream stream(model);
  std::string text;
  StepRecorder recorder(stats_file.is_open());
  GenerateOptions generate_options;
  generate_options.max_tokens = flags.max_tokens;
  generate_options.sampling = flags.sampling.options;
  generate_options.stop_at_eos = !flags.ignore_eos;
  if (flags.chat) generate_options.stop_tokens = model.chat_stop_tokens(flags.chat_template);
  generate_options.on_token = [&](std::int32_t token) {
    const std::string piece = stream.push(token);
    text += piece;
    if (!flags.common.json) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
    return !interrupted();
  };
  StepAudit audit(engine, flags.audit_every);
  generate_options.on_step = [&] {
    recorder.record(engine);
    audit.after_step();
  };
  const GenerateResult result = generate(engine, sequence, logits, generate_options);
  const std::string rest = stream.flush();
  text += rest;

  nlohmann::ordered_json report;
  report["model"] = flags.model;
  report["device"] = device.description();
  report["policy"] = policy_json(engine.policy());
  flags.attention.report(report);
  report["prompt_tokens"] = tokens.size();
  report["generated_tokens"] = result.tokens.size();
  report["finish_reason"] = finish_reason_name(result.reason);
  report["prefill_seconds"] = prefill_seconds;
  report["prefill_tokens_per_second"] = static_cast<double>(tokens.size()) / prefill_seconds;
  report["decode_seconds"] = result.decode_seconds;
  report["decode_tokens_per_second"] =
      result.decode_steps > 0 ? static_cast<double>(result.decode_steps) / result.decode_seconds
                              : 0.0;
  report["attention"] = totals_json(engine.totals());
  report["telemetry"] = audit.telemetry().report(engine.policy());
  if (stats_file.is_open()) {
    nlohmann::ordered_json with_steps = report;
    with_steps["steps"] = recorder.steps();
    stats_file.commit(with_steps.dump(1) + "\n");
  }
  if (flags.common.json) {
    report["text"] = text;
    report["tokens"] = result.tokens;
    std::printf("%s\n",
                report.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::printf("%s\n", rest.c_str());
    std::fprintf(stderr, "%s%s\n", summary_line(report).c_str(),
                 audit.telemetry().details(engine.policy()).c_str());
  }
  return interrupted() ? kInterruptedExit : 0;
}

}  // namespace

void add_generate(CLI::App& app, Action& action) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text");
  command->footer(
      "Example: twilight generate --model models/vesper-19m --prompt 'It was a cold morning' "
      "--max-tokens 64");
  flags->common.add(*command);
  flags->attention.add(*command);
  flags->attention.add_model_profile(*command);
  flags->sampling.add(*command);
  command->add_option("--model", flags->model, "Checkpoint folder or GGUF file")->required();
  auto* source = command->add_option_group("prompt");
  source->add_option("--prompt", flags->prompt, "Text to continue");
  source->add_option("--prompt-file", flags->prompt_file, "File with the text to continue");
  source->require_option(1);
  auto* chat = command->add_flag(
      "--chat", flags->chat, "Take the prompt as a user's message, in the model's chat template");
  command->add_option("--system", flags->system, "System message of the conversation")->needs(chat);
  command
      ->add_option("--chat-template", flags->chat_template,
                   "Template to use instead of the model's: chatml, gemma, llama-2, llama-3, "
                   "mistral-v1, mistral-v3, vicuna, zephyr")
      ->needs(chat);
  command->add_option("--max-tokens", flags->max_tokens, "Most tokens to generate")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  command->add_option("--ctx", flags->context, "Longest context, tokens; 0 takes the model's")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on past the model's end token");
  command->add_option("--stats", flags->stats,
                      "Write per-step, per-layer, per-head statistics (JSON)");
  command->add_flag("--force", flags->force, "Replace the statistics file if it exists");
  command
      ->add_option("--audit-every", flags->audit_every,
                   "Measure the true kept mass, which reads every key, in one step of this many; "
                   "0 never")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  command->callback([flags, &action] {
    action = [flags] {
      flags->attention.settle(flags->model);
      return run_generate(*flags);
    };
  });
}

}  // namespace twilight::app
