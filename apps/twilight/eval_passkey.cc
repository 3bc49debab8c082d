#include <algorithm>

#include "eval.h"
#include "interrupt.h"
#include "passkey.h"
#include "progress.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr std::int32_t kAnswerTokens = 10;

struct Score {
  DecodeTotals totals;
  std::int32_t found = 0;
  std::vector<std::int32_t> found_at;  // per depth
};

}  // namespace

int run_eval_passkey(const PasskeyFlags& flags) {
  EvalSetup setup(flags.eval, kAnswerTokens + flags.eval.attention.page_size);
  const PasskeyBuilder builder(setup.model, setup.text);
  const bool bars = !flags.eval.common.json;
  // Deep facts first: the next prompt then shares the text before its own fact with the one before,
  // and only the rest is read again.
  std::vector<std::size_t> order(flags.depths.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return flags.depths[a] > flags.depths[b]; });
  Random random(flags.seed);
  std::vector<Score> scores(setup.policies.size());
  for (Score& score : scores) score.found_at.assign(flags.depths.size(), 0);
  std::vector<float> logits(static_cast<std::size_t>(setup.model.info().vocab_size));
  Sequence prompt = setup.engine.cache().new_sequence();
  std::vector<std::int32_t> read;  // tokens `prompt` holds
  const auto total = static_cast<std::int64_t>(flags.depths.size()) * flags.trials;
  std::int64_t done = 0;
  ProgressBar bar("Finding hidden numbers", "facts", bars);
  for (const std::size_t depth : order) {
    for (std::int32_t trial = 0; trial < flags.trials; ++trial) {
      bar.update(done++, total);
      const PasskeyTask task =
          builder.make(flags.eval.context, flags.depths[depth], kAnswerTokens, random);
      const auto common = static_cast<std::size_t>(
          std::mismatch(read.begin(), read.end(), task.prompt.begin(), task.prompt.end()).first -
          read.begin());
      const std::size_t keep = std::min(common, task.prompt.size() - 1);
      prompt.truncate(static_cast<std::int32_t>(keep));
      const auto stop = [](std::int64_t, std::int64_t) { return !interrupted(); };
      if (setup.engine.prefill(prompt, std::span(task.prompt).subspan(keep), logits, stop) !=
          Engine::Status::kOk) {
        return kInterruptedExit;
      }
      read = task.prompt;
      for (std::size_t i = 0; i < setup.policies.size(); ++i) {
        if (setup.policies.size() > 1 || done == 1) {
          setup.engine.set_policy(setup.policies[i]);
          setup.engine.collect_stats(true, flags.eval.audit);
        }
        setup.engine.reset_totals();
        Sequence sequence = prompt.fork();
        GenerateOptions options;
        options.max_tokens = kAnswerTokens;
        const GenerateResult result = generate(setup.engine, sequence, logits, options);
        const bool found = answers(task, setup.model.decode(result.tokens));
        scores[i].found += found ? 1 : 0;
        scores[i].found_at[depth] += found ? 1 : 0;
        scores[i].totals.merge(setup.engine.totals());
      }
    }
  }
  bar.clear();
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < setup.policies.size(); ++i) {
    const nlohmann::ordered_json metrics = metrics_json(setup.policies[i], scores[i].totals);
    nlohmann::ordered_json result;
    result["attention"] = metrics["attention"];
    result["found"] = scores[i].found;
    result["trials"] = total;
    result["ppl"] = nullptr;
    result["tokens"] = scores[i].totals.steps;
    for (const auto& [key, value] : metrics.items()) result[key] = value;
    for (std::size_t d = 0; d < flags.depths.size(); ++d) {
      result["found_per_depth"].push_back(
          {{"depth", flags.depths[d]}, {"found", scores[i].found_at[d]}, {"trials", flags.trials}});
    }
    results.push_back(std::move(result));
  }
  nlohmann::ordered_json report;
  report["task"] = "passkey";
  report["seed"] = flags.seed;
  finish_report(std::move(report), results,
                {"found", "trials", "bytes_ratio_sparse_layers", "kept_mean", "union_mean"},
                flags.eval, setup);
  return 0;
}

}  // namespace twilight::app
