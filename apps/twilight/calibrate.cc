#include "calibrate.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr float kLadder[] = {0.50F, 0.60F, 0.70F, 0.75F, 0.80F, 0.85F,
                             0.90F, 0.93F, 0.95F, 0.97F, 0.98F, 0.99F};
// Losses of neighbouring tokens are alike over about a sentence.
constexpr std::size_t kLossBlock = 16;

// Logits to log-probabilities, in place.
void log_softmax(std::span<float> logits) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit - top));
  const auto norm = static_cast<float>(std::log(total) + static_cast<double>(top));
  for (float& logit : logits) logit -= norm;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double decode_timed(Engine& engine, Sequence& sequence, std::int32_t token,
                    std::span<float> logits) {
  Sequence* const batch[] = {&sequence};
  const auto start = std::chrono::steady_clock::now();
  if (engine.decode(batch, {&token, 1}, logits) != Engine::Status::kOk) {
    throw Error(ErrorCode::kInternal, "[calibrate] the cache ran out of pages");
  }
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

std::span<const float> p_ladder() { return kLadder; }

double Trial::ppl_change() const { return std::expm1(loss.mean); }

double Trial::ppl_change_half_width() const { return std::exp(loss.mean) * loss.half_width(); }

bool Trial::within(double target) const {
  const double error = std::isfinite(loss.standard_error) ? loss.standard_error : 0;
  return loss.mean + error <= std::log1p(target);
}

TextPart::TextPart(Engine& engine, const Sequence& prompt, std::span<const std::int32_t> tokens,
                   const Progress& progress)
    : engine_(engine), prompt_(prompt), tokens_(tokens) {
  engine_.set_policy(make_policy("dense"));
  engine_.collect_stats(true, false);
  const auto vocab = static_cast<std::size_t>(engine_.model().info().vocab_size);
  std::vector<float> logs(positions() * vocab);
  std::vector<double> times;
  Sequence sequence = prompt_.fork();
  for (std::size_t i = 0; i < positions(); ++i) {
    if (!progress(static_cast<std::int64_t>(i), static_cast<std::int64_t>(positions()))) return;
    const std::span<float> row(logs.data() + i * vocab, vocab);
    times.push_back(decode_timed(engine_, sequence, tokens_[i], row));
    log_softmax(row);
  }
  log_probs_ = std::move(logs);
  dense_milliseconds_ = median(std::move(times));
}

double TextPart::dense_ppl() const {
  const auto vocab = static_cast<std::size_t>(engine_.model().info().vocab_size);
  double sum = 0;
  for (std::size_t i = 0; i < positions(); ++i) {
    sum -= static_cast<double>(log_probs_[i * vocab + static_cast<std::size_t>(tokens_[i + 1])]);
  }
  return std::exp(sum / static_cast<double>(positions()));
}

Trial TextPart::run(const SparsePolicy& policy, std::int32_t audit_every, std::size_t positions_in,
                    const Progress& progress) {
  const std::size_t count = positions_in == 0 ? positions() : std::min(positions_in, positions());
  const auto vocab = static_cast<std::size_t>(engine_.model().info().vocab_size);
  const auto layers = static_cast<std::size_t>(engine_.model().info().num_layers);
  engine_.set_policy(policy);
  engine_.reset_totals();
  Trial out;
  out.policy = engine_.policy();
  out.layer_bytes.assign(layers, 0);
  std::vector<float> logits(vocab);
  std::vector<double> times, change;
  double nll = 0;
  Sequence sequence = prompt_.fork();
  StepAudit audit(engine_, audit_every);
  for (std::size_t i = 0; i < count; ++i) {
    if (!progress(static_cast<std::int64_t>(i), static_cast<std::int64_t>(count))) {
      throw Error(ErrorCode::kInternal, "[calibrate] interrupted");
    }
    const bool timed = !audit.next_is_audited();
    const double time = decode_timed(engine_, sequence, tokens_[i], logits);
    if (timed) times.push_back(time);
    for (std::size_t layer = 0; layer < layers; ++layer) {
      for (const LayerStats& stats : engine_.last_stats(static_cast<std::int32_t>(layer))) {
        out.layer_bytes[layer] +=
            static_cast<double>(stats.bytes_read) / static_cast<double>(count);
      }
    }
    audit.after_step();
    log_softmax(logits);
    const float* dense = log_probs_.data() + i * vocab;
    const auto target = static_cast<std::size_t>(tokens_[i + 1]);
    change.push_back(static_cast<double>(dense[target] - logits[target]));
    nll -= static_cast<double>(logits[target]);
    double divergence = 0;
    for (std::size_t v = 0; v < vocab; ++v) {
      divergence +=
          std::exp(static_cast<double>(dense[v])) * static_cast<double>(dense[v] - logits[v]);
    }
    out.divergence += divergence / static_cast<double>(count);
  }
  out.loss = block_mean_error({change}, kLossBlock);
  out.ppl = std::exp(nll / static_cast<double>(count));
  out.totals = engine_.totals();
  out.telemetry = audit.telemetry();
  out.milliseconds = median(std::move(times));
  return out;
}

std::vector<std::size_t> choose_rungs(const std::vector<std::vector<double>>& bytes,
                                      const std::vector<std::vector<double>>& loss,
                                      std::vector<std::size_t> start, double budget) {
  std::vector<std::size_t> rungs = std::move(start);
  double spent = 0;
  for (std::size_t layer = 0; layer < rungs.size(); ++layer) spent += loss[layer][rungs[layer]];
  for (;;) {
    // The move to any rung of fewer bytes that fits what is left and gains most for it; a move that
    // loses nothing comes first.
    double best = 0;
    std::size_t best_layer = rungs.size(), best_rung = 0;
    for (std::size_t layer = 0; layer < rungs.size(); ++layer) {
      for (std::size_t rung = 0; rung < bytes[layer].size(); ++rung) {
        const double saved = bytes[layer][rungs[layer]] - bytes[layer][rung];
        const double added = loss[layer][rung] - loss[layer][rungs[layer]];
        if (saved <= 0 || spent + added > budget) continue;
        const double gain = saved / std::max(added, 1e-12);
        if (gain > best) {
          best = gain;
          best_layer = layer;
          best_rung = rung;
        }
      }
    }
    if (best_layer == rungs.size()) return rungs;
    spent += loss[best_layer][best_rung] - loss[best_layer][rungs[best_layer]];
    rungs[best_layer] = best_rung;
  }
}

}  // namespace twilight::app
