#include <cstdio>
#include <memory>

#include "commands.h"
#include "eval.h"
#include "paths.h"
#include "stats_json.h"
#include "twilight/error.h"

namespace twilight::app {

void EvalFlags::add(CLI::App& command) {
  common.add(command);
  attention.add(command);
  auto* preset = command.get_option("--attention");
  command.remove_option(preset);
  command
      .add_option("--attention", presets,
                  "Presets to compare over the same prompts, e.g. dense,paper,quest:1024")
      ->delimiter(',')
      ->capture_default_str()
      ->group("Attention");
  command.add_option("--model", model, "Checkpoint folder; the bundled model by default");
  command.add_option("--text", text, "Text file; the bundled novel by default");
  command.add_option("--ctx", context, "Tokens of context")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 30));
  command.add_flag("!--no-audit", audit, "Skip the true kept mass, which reads every key");
  command.add_option("--out", out, "Write the JSON report to a new file");
  command.add_flag("--force", force, "Replace the report file if it exists");
}

std::vector<SparsePolicy> EvalFlags::policies() const {
  if (presets.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "[eval] presets, got none, accepted one or more");
  }
  std::vector<SparsePolicy> list;
  for (const std::string& preset : presets) {
    list.push_back(attention.policy(preset));
    // Quality is judged on the sparse path whatever the machine's crossover, unless asked
    // otherwise.
    if (!attention.dense_below) list.back().dense_below_tokens = 0;
  }
  return list;
}

namespace {

EngineOptions engine_options(const EvalFlags& flags, const std::vector<SparsePolicy>& policies,
                             std::int32_t extra_tokens) {
  EngineOptions options;
  options.policy = policies.front();
  options.page_size = flags.attention.page_size;
  options.max_context = flags.context;
  options.cache_tokens = flags.context + extra_tokens + 2 * options.page_size;
  return options;
}

}  // namespace

EvalSetup::EvalSetup(const EvalFlags& flags, std::int32_t extra_tokens)
    : policies(flags.policies()),
      out(flags.out.empty() ? OutputFile() : OutputFile(flags.out, flags.force)),
      device(flags.common.device),
      model(load_model(flags.model.empty() ? bundled_model() : flags.model, flags.common)),
      text(read_text(flags.text.empty() ? bundled_novel() : flags.text)),
      engine(device, model, engine_options(flags, policies, extra_tokens)) {}

nlohmann::ordered_json metrics_json(const SparsePolicy& policy, const DecodeTotals& totals) {
  nlohmann::ordered_json out;
  out["attention"] = policy.name;
  out["bytes_ratio"] = totals.bytes_ratio();
  out["bytes_ratio_sparse_layers"] = totals.sparse_bytes_ratio();
  out["kept_mean"] = totals.kept_mean();
  out["union_mean"] = totals.attended_mean();
  out["candidates_mean"] = totals.candidates_mean();
  out["estimated_mass_mean"] = totals.estimated_mass_mean();
  if (totals.true_mass_counted > 0 || totals.sparse_layers == 0) {
    out["true_mass_mean"] = totals.true_mass_mean();
  } else {
    out["true_mass_mean"] = nullptr;
  }
  out["sparse_layer_steps"] = totals.sparse_layers;
  out["dense_layer_steps"] = totals.dense_layers;
  out["policy"] = policy_json(policy);
  return out;
}

void finish_report(nlohmann::ordered_json report, const nlohmann::ordered_json& results,
                   const std::vector<std::string>& columns, const EvalFlags& flags,
                   EvalSetup& setup) {
  report["model"] = setup.model.info().path;
  report["device"] = setup.device.description();
  report["ctx"] = flags.context;
  if (results.size() == 1) {
    for (const auto& [key, value] : results.front().items()) report[key] = value;
  }
  report["results"] = results;
  const std::string text = report.dump(2);
  setup.out.commit(text + "\n");
  if (flags.common.json) {
    std::printf("%s\n", text.c_str());
    return;
  }
  std::printf("%-16s", "attention");
  for (const std::string& column : columns) std::printf(" %26s", column.c_str());
  std::printf("\n");
  for (const auto& row : results) {
    std::printf("%-16s", row["attention"].get<std::string>().c_str());
    for (const std::string& column : columns) {
      const auto& value = row[column];
      if (value.is_number_float()) {
        std::printf(" %26.4f", value.get<double>());
      } else {
        std::printf(" %26s", value.is_null() ? "-" : value.dump().c_str());
      }
    }
    std::printf("\n");
  }
}

void add_eval(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("eval", "Measure quality: perplexity, hidden facts");
  command->footer("Example: twilight eval ppl --ctx 4096 --last 256 --attention dense,paper");
  command->require_subcommand(1);

  auto ppl = std::make_shared<PplFlags>();
  CLI::App* ppl_command = command->add_subcommand(
      "ppl", "Perplexity of a text's last tokens, read through the decode path");
  ppl_command->footer(
      "Example: twilight eval ppl --ctx 32768 --last 1024 --attention dense,paper --json");
  ppl->eval.context = 32768;
  ppl->eval.add(*ppl_command);
  ppl_command->add_option("--last", ppl->last, "Positions at the end that take the decode path")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
  ppl_command->callback([ppl, &action] { action = [ppl] { return run_eval_ppl(*ppl); }; });

  auto passkey = std::make_shared<PasskeyFlags>();
  CLI::App* passkey_command =
      command->add_subcommand("passkey", "Find a number hidden in a text at several depths");
  passkey_command->footer(
      "Example: twilight eval passkey --ctx 4096 --depths 0.1,0.5,0.9 --trials 4 --attention "
      "paper");
  passkey->eval.add(*passkey_command);
  passkey_command->add_option("--depths", passkey->depths, "Where to hide it, 0 to 1")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  passkey_command->add_option("--trials", passkey->trials, "Facts per depth")
      ->capture_default_str()
      ->check(CLI::Range(1, 100000));
  passkey_command->add_option("--seed", passkey->seed, "Seed of the facts")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  passkey_command->callback(
      [passkey, &action] { action = [passkey] { return run_eval_passkey(*passkey); }; });
}

}  // namespace twilight::app
