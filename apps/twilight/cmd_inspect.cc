#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "commands.h"
#include "flags.h"
#include "inspect_page.h"
#include "inspect_picture.h"
#include "inspect_record.h"
#include "interrupt.h"
#include "markup.h"
#include "model_json.h"
#include "output.h"
#include "passkey.h"
#include "paths.h"
#include "progress.h"
#include "real_range.h"
#include "stats_json.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

struct InspectFlags {
  CommonFlags common;
  AttentionFlags attention;
  SamplingFlags sampling;
  std::string model, prompt, prompt_file, out;
  bool prompt_given = false, file_given = false;
  std::int32_t context = 16384;
  std::int32_t tokens = 48;
  std::uint64_t fact_seed = 0;
  double depth = 0.4;
  bool ignore_eos = false, audit = false, force = false;
};

enum class Format { kNone, kHtml, kSvg };

Format format_of(const InspectFlags& flags) {
  if (flags.out.empty()) {
    if (flags.common.json) return Format::kNone;
    throw Error(ErrorCode::kInvalidArgument,
                "[--out] no output, accepted --out FILE.html, --out FILE.svg or --json");
  }
  const std::string extension = std::filesystem::path(flags.out).extension().string();
  if (extension == ".html" || extension == ".htm") return Format::kHtml;
  if (extension == ".svg") return Format::kSvg;
  throw Error(ErrorCode::kInvalidArgument, "[--out] kind of picture, got " + flags.out +
                                               ", accepted a name ending in .html or .svg");
}

// The tokens to read; of a hidden fact also the task.
struct Prompt {
  std::vector<std::int32_t> tokens;
  std::optional<PasskeyTask> task;
};

Prompt make_prompt(const InspectFlags& flags, const Model& model) {
  Prompt out;
  if (!flags.prompt_given && !flags.file_given) {
    Random random(flags.fact_seed);
    out.task = PasskeyBuilder(model, read_text(bundled_novel()))
                   .make(flags.context, flags.depth, flags.tokens, random);
    out.tokens = out.task->prompt;
    return out;
  }
  const std::string text = flags.file_given ? read_text(flags.prompt_file) : flags.prompt;
  if (!text.empty()) out.tokens = model.encode(text);
  const std::int64_t limit = model.info().max_context - flags.tokens;
  if (text.empty() || static_cast<std::int64_t>(out.tokens.size()) > limit) {
    throw Error(ErrorCode::kInvalidArgument,
                "[prompt] length of the prompt, got " + std::to_string(out.tokens.size()) +
                    " tokens, accepted 1 to " + std::to_string(limit) + " beside --tokens " +
                    std::to_string(flags.tokens));
  }
  return out;
}

void print_json(const InspectData& data, const InspectFlags& flags, const Device& device,
                const Engine& engine, const GenerateResult& result) {
  nlohmann::ordered_json report;
  report["model"] = engine.model().info().path;
  report["checkpoint"] = format_json(engine.model().info(), device);
  report["device"] = device.description();
  report["policy"] = policy_json(engine.policy());
  flags.attention.report(report);
  report["prompt_tokens"] = data.prompt_tokens;
  report["generated_tokens"] = result.tokens.size();
  report["finish_reason"] = finish_reason_name(result.reason);
  if (!data.question.empty()) {
    report["question"] = data.question;
    report["found"] = data.verdict.starts_with("found");
  }
  report["text"] = data.answer;
  report["attention"] = totals_json(engine.totals());
  if (!flags.out.empty()) report["picture"] = flags.out;
  report["step_tokens"] = data.step_tokens;
  report["layers"] = layers_json(data);
  std::printf("%s\n",
              report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
}

int run_inspect(const InspectFlags& flags) {
  const Format format = format_of(flags);
  EngineOptions options;
  options.policy = flags.attention.policy();
  // Where dense attention would be as fast is no matter here: the question is what sparse reads.
  if (!flags.attention.dense_below) options.policy.dense_below_tokens = 0;
  options.page_size = flags.attention.page_size();
  OutputFile file;
  if (format != Format::kNone) file = OutputFile(flags.out, flags.force);
  const Device device(flags.common.device);
  const Model model = load_model(flags.model, flags.common, flags.attention);
  const Prompt prompt = make_prompt(flags, model);
  options.max_context = static_cast<std::int32_t>(prompt.tokens.size()) + flags.tokens;
  Engine engine(device, model, options);
  engine.collect_stats(true, flags.audit);
  flags.attention.announce(flags.common);
  Sequence sequence = engine.cache().new_sequence();
  std::vector<float> logits(static_cast<std::size_t>(model.info().vocab_size));
  {
    ProgressBar bar("Reading the prompt", "tokens", !flags.common.json);
    if (engine.prefill(sequence, prompt.tokens, logits, bar.callback()) ==
        Engine::Status::kCancelled) {
      return kInterruptedExit;
    }
  }

  InspectData data;
  data.q_heads = model.info().num_q_heads;
  data.kv_heads = model.info().num_kv_heads;
  data.layers.resize(static_cast<std::size_t>(model.info().num_layers));
  GenerateOptions generate_options;
  generate_options.max_tokens = flags.tokens;
  generate_options.sampling = flags.sampling.options;
  generate_options.stop_at_eos = !flags.ignore_eos && !prompt.task;
  std::size_t written = 0;
  generate_options.on_token = [&](std::int32_t token) {
    if (written++ > 0) data.step_tokens.push_back(model.token_bytes(token));
    return !interrupted();
  };
  generate_options.on_step = [&] { record_step(engine, data); };
  ProgressBar bar("Writing", "tokens", !flags.common.json);
  const GenerateResult result = generate(engine, sequence, logits, generate_options);
  bar.clear();
  // A step that ended the text wrote no token of it.
  std::size_t steps = 0;
  for (const InspectLayer& layer : data.layers) steps = std::max(steps, layer.path.size());
  while (data.step_tokens.size() < steps) data.step_tokens.emplace_back("[end]");

  std::filesystem::path folder = model.info().path;
  if (!folder.has_filename()) folder = folder.parent_path();
  data.model = folder.filename().string();
  data.device = format_line(model.info(), device) + "; " + device.description();
  data.policy = engine.policy().name;
  data.prompt_tokens = static_cast<std::int64_t>(prompt.tokens.size());
  data.answer = model.decode(result.tokens);
  if (prompt.task) {
    data.question = "What is the special magic number for " + prompt.task->key + "?";
    data.verdict = std::string(answers(*prompt.task, data.answer) ? "found" : "not found") +
                   "; hidden at " + std::to_string(std::lround(flags.depth * 100)) +
                   " % of the text: “" + prompt.task->fact + "”";
  }
  const DecodeTotals& totals = engine.totals();
  data.bytes_ratio = totals.bytes_ratio();
  data.sparse_bytes_ratio = totals.sparse_bytes_ratio();
  data.kept_mean = totals.kept_mean();
  data.audited = flags.audit && totals.true_mass_counted > 0;
  data.mass_mean = data.audited ? totals.true_mass_mean() : totals.estimated_mass_mean();

  if (format == Format::kHtml) file.commit(draw_page(data));
  if (format == Format::kSvg) {
    file.commit("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n" +
                draw_picture(data, {.standalone = true}).svg);
  }
  if (flags.common.json) {
    print_json(data, flags, device, engine, result);
  } else {
    std::printf("%s\n", data.answer.c_str());
    for (const auto& [name, value] : headline_figures(data)) {
      std::fprintf(stderr, "%s %s; ", value.c_str(), name.c_str());
    }
    std::fprintf(stderr, "picture in %s\n", flags.out.c_str());
  }
  return interrupted() ? kInterruptedExit : 0;
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* command = app.add_subcommand(
      "inspect", "Draw what every layer and head read while a text was generated");
  command->footer(
      "Without a prompt it looks for a fact hidden in the bundled novel. Unless --dense-below is\n"
      "given, short contexts are pruned too.\n"
      "Example: twilight inspect --out picture.html");
  flags->common.add(*command);
  flags->attention.add(*command);
  flags->attention.add_model_profile(*command);
  flags->sampling.add(*command);
  command->add_option("--model", flags->model,
                      "Checkpoint folder or GGUF file; the bundled model by default");
  auto* prompt = command->add_option("--prompt", flags->prompt, "Text to continue");
  auto* prompt_file =
      command->add_option("--prompt-file", flags->prompt_file, "File with the text to continue");
  prompt->excludes(prompt_file);
  command->add_option("--tokens", flags->tokens, "Most tokens to generate")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on past the model's end token");
  command->add_option("--out", flags->out, "Picture to write: FILE.html or FILE.svg");
  command->add_flag("--force", flags->force, "Replace the picture if it exists");
  command->add_flag("--audit", flags->audit,
                    "Measure the true kept mass too, reading every key, and draw that");
  const std::string group = "Hidden fact (without a prompt)";
  for (CLI::Option* option :
       {command->add_option("--ctx", flags->context, "Tokens of the whole context")
            ->capture_default_str()
            ->check(CLI::Range(1, 1 << 30)),
        command->add_option("--depth", flags->depth, "Where to hide it, 0 to 1")
            ->capture_default_str()
            ->check(real_range(0.0, 1.0)),
        command->add_option("--fact-seed", flags->fact_seed, "Draws the fact")
            ->capture_default_str()}) {
    option->group(group)->excludes(prompt)->excludes(prompt_file);
  }
  command->callback([flags, prompt, prompt_file, &action] {
    flags->prompt_given = prompt->count() > 0;
    flags->file_given = prompt_file->count() > 0;
    action = [flags] {
      if (flags->model.empty()) flags->model = bundled_model();
      flags->attention.settle(flags->model);
      return run_inspect(*flags);
    };
  });
}

}  // namespace twilight::app
