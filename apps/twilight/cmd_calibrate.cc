#include <cstdio>
#include <cstdlib>
#include <memory>

#include "calibrate_labels.h"
#include "calibration.h"
#include "commands.h"
#include "flags.h"
#include "interrupt.h"
#include "markup.h"
#include "output.h"
#include "paths.h"
#include "profile.h"
#include "progress.h"
#include "table.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

// "0.5%" or "0.005".
double read_target(const std::string& text) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  if (unit == "%") value /= 100;
  if (end == text.c_str() || (!unit.empty() && unit != "%") || !(value > 0 && value <= 1)) {
    throw Error(ErrorCode::kInvalidArgument, "[--target-ppl] perplexity to lose, got '" + text +
                                                 "', accepted above 0 % to 100 %, e.g. 0.5%");
  }
  return value;
}

// The channels for the selector double_sparsity, and a profile of the policy with them.
int run_labels(const CalibrateFlags& flags) {
  SparsePolicy policy = flags.attention.policy();
  if (policy.is_dense()) {
    throw Error(ErrorCode::kInvalidArgument,
                "[calibrate] preset with --labels, got dense, accepted a sparse one, e.g. paper");
  }
  OutputFile out = flags.out.empty() ? OutputFile() : OutputFile(flags.out, flags.force);
  const Device device(flags.common.device);
  const Model model = load_model(flags.model.empty() ? bundled_model() : flags.model, flags.common);
  const ModelInfo& info = model.info();
  // Of the least to the half of the channels, a quarter of them by default.
  const std::int32_t channels =
      flags.label_channels != 0 ? flags.label_channels : std::max(16, info.head_dim / 4 / 16 * 16);
  if (channels % 16 != 0 || channels > std::min(128, info.head_dim)) {
    throw Error(ErrorCode::kInvalidArgument, "[--label-channels] channels, got " +
                                                 std::to_string(channels) +
                                                 ", accepted multiples of 16 up to " +
                                                 std::to_string(std::min(128, info.head_dim)));
  }
  const std::string path = flags.text.empty() ? bundled_novel() : flags.text;
  std::vector<std::int32_t> tokens = model.encode(read_text(path));
  if (flags.last >= flags.context || tokens.size() < static_cast<std::size_t>(flags.context)) {
    throw Error(ErrorCode::kInvalidArgument,
                "[calibrate] --ctx, got " + std::to_string(flags.context) +
                    ", accepted more than --last " + std::to_string(flags.last) + " up to the " +
                    std::to_string(tokens.size()) + " tokens of " + path);
  }
  tokens.resize(static_cast<std::size_t>(flags.context));
  Engine engine(device, model, engine_options(flags));
  ProgressBar bar("Reading the text", "tokens", !flags.common.json);
  const LabelCalibration found =
      calibrate_labels(engine, tokens, flags.last, channels, bar.callback());
  bar.clear();
  if (found.labels.empty()) return kInterruptedExit;
  policy.selector = "double_sparsity";
  policy.candidate_mass = 0;
  policy.far_tail = false;
  policy.num_labels = channels;
  policy.labels = found.labels;
  validate_policy(policy);
  Json report;
  report["model"] = info.path;
  report["device"] = device.description();
  report["text"] = path;
  report["ctx"] = flags.context;
  report["queries"] = flags.last;
  report["attention"] = policy.name;
  report["label_channels"] = channels;
  report["share"] = found.share;
  if (out.is_open()) {
    Profile profile;
    profile.policy = policy;
    profile.page_size = flags.attention.page_size();
    profile.model = profile_model(info);
    out.commit(profile_text(profile, report));
  }
  if (flags.common.json) {
    report["labels"] = found.labels;
    std::printf("%s\n", report.dump(2).c_str());
    return 0;
  }
  std::printf(
      "%d of %d channels a KV head hold %s %% of the mean of sum |q_d k_d| over %d queries "
      "and %d keys\n",
      channels, info.head_dim, fixed(found.share * 100, 1).c_str(), flags.last, flags.context);
  std::fflush(stdout);
  if (out.is_open()) std::fprintf(stderr, "Profile in %s\n", out.path().c_str());
  return 0;
}

}  // namespace

void add_calibrate(CLI::App& app, Action& action) {
  auto flags = std::make_shared<CalibrateFlags>();
  CLI::App* command = app.add_subcommand(
      "calibrate", "Find the p that keeps a perplexity on a text, and write it as a profile");
  command->footer(
      "Every command that takes --attention takes the file as --profile FILE instead. As\n"
      "twilight.json in the model's folder, or FILE.gguf.twilight.json beside a GGUF file, it is "
      "what\n"
      "generate, demo, inspect, serve and bench use by default. calibrate itself starts from the\n"
      "preset and never reads it.\n"
      "Example: twilight calibrate --text data/Persuasion.txt --target-ppl 0.5% --out vesper.json");
  flags->common.add(*command);
  flags->attention.add(*command);
  command->remove_option(command->get_option("--profile"));
  command->add_option("--model", flags->model,
                      "Checkpoint folder or GGUF file; the bundled model by default");
  command->add_option("--text", flags->text, "Validation text; the bundled novel by default");
  command->add_option("--ctx", flags->context, "Tokens of context")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 30));
  command
      ->add_option("--last", flags->last,
                   "Positions to choose by; as many after them are held out for the check")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--target-ppl", flags->target, "Perplexity that may be lost, e.g. 0.5%")
      ->capture_default_str();
  command->get_option("--dense-layers")
      ->description("Layers from the bottom that stay dense; by default as few as keep the target");
  command->add_flag("--no-layers", flags->no_layers, "Do not look for a p of each layer");
  command
      ->add_option("--audit-every", flags->audit_every,
                   "Measure the true kept mass in one step of this many; 0 never")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 30));
  command->add_flag("--labels", flags->labels,
                    "Find the label channels of the selector double_sparsity instead, and write "
                    "the preset with it and them");
  command
      ->add_option("--label-channels", flags->label_channels,
                   "Channels a KV head, a multiple of 16; 0: a quarter of the head")
      ->capture_default_str()
      ->check(CLI::Range(0, 128));
  command->add_option("--out", flags->out, "Profile to write, a new file (JSON)");
  command->add_flag("--force", flags->force, "Replace the profile if it exists");
  command->callback([flags, &action] {
    action = [flags] {
      try {
        if (flags->labels) return run_labels(*flags);
        return Calibration(*flags, read_target(flags->target)).run();
      } catch (const Error&) {
        if (interrupted()) return kInterruptedExit;
        throw;
      }
    };
  });
}

}  // namespace twilight::app
