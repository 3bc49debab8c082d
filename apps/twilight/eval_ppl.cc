#include <algorithm>
#include <cmath>

#include "eval.h"
#include "interrupt.h"
#include "progress.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

// -log softmax(logits)[target], in nats.
double negative_log_likelihood(std::span<const float> logits, std::int32_t target) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit - top));
  return std::log(total) - static_cast<double>(logits[static_cast<std::size_t>(target)] - top);
}

}  // namespace

int run_eval_ppl(const PplFlags& flags) {
  const std::int32_t context = flags.eval.context;
  if (flags.last >= context) {
    throw Error(ErrorCode::kInvalidArgument,
                "[eval] --last, got " + std::to_string(flags.last) +
                    ", accepted 1 to --ctx - 1 = " + std::to_string(context - 1));
  }
  EvalSetup setup(flags.eval, flags.last);
  std::vector<std::int32_t> tokens = setup.model.encode(setup.text);
  // One token more than the context: the last position predicts it.
  if (static_cast<std::int64_t>(tokens.size()) < std::int64_t{context} + 1) {
    throw Error(ErrorCode::kInvalidArgument,
                "[eval] the text is too short, got " + std::to_string(tokens.size()) +
                    " tokens, accepted at least " + std::to_string(context + 1));
  }
  tokens.resize(static_cast<std::size_t>(context) + 1);
  const std::size_t first = static_cast<std::size_t>(context - flags.last);
  const bool bars = !flags.eval.common.json;
  Sequence prompt = setup.engine.cache().new_sequence();
  {
    ProgressBar bar("Reading the text", "tokens", bars);
    if (setup.engine.prefill(prompt, std::span(tokens).first(first), {}, bar.callback()) ==
        Engine::Status::kCancelled) {
      return kInterruptedExit;
    }
  }
  std::vector<float> logits(static_cast<std::size_t>(setup.model.info().vocab_size));
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const SparsePolicy& policy : setup.policies) {
    setup.engine.set_policy(policy);
    setup.engine.collect_stats(true, flags.eval.audit);
    setup.engine.reset_totals();
    Sequence sequence = prompt.fork();
    Sequence* const batch[] = {&sequence};
    ProgressBar bar("Scoring " + policy.name, "tokens", bars);
    double sum = 0, squares = 0;
    for (std::int32_t i = 0; i < flags.last; ++i) {
      if (interrupted()) return kInterruptedExit;
      bar.update(i, flags.last);
      const std::size_t at = first + static_cast<std::size_t>(i);
      if (setup.engine.decode(batch, {&tokens[at], 1}, logits) != Engine::Status::kOk) {
        throw Error(ErrorCode::kInternal, "[eval] the cache ran out of pages");
      }
      const double nll = negative_log_likelihood(logits, tokens[at + 1]);
      sum += nll;
      squares += nll * nll;
    }
    const double count = flags.last;
    const double mean = sum / count;
    nlohmann::ordered_json result;
    const nlohmann::ordered_json metrics =
        metrics_json(setup.engine.policy(), setup.engine.totals());
    result["attention"] = metrics["attention"];
    result["ppl"] = std::exp(mean);
    result["nll"] = mean;
    result["nll_standard_error"] = std::sqrt(std::max(0.0, squares / count - mean * mean) / count);
    result["tokens"] = flags.last;
    result["found"] = nullptr;
    result["trials"] = nullptr;
    for (const auto& [key, value] : metrics.items()) result[key] = value;
    results.push_back(std::move(result));
  }
  nlohmann::ordered_json report;
  report["task"] = "ppl";
  finish_report(std::move(report), results,
                {"ppl", "bytes_ratio_sparse_layers", "kept_mean", "union_mean", "true_mass_mean"},
                flags.eval, setup);
  return 0;
}

}  // namespace twilight::app
