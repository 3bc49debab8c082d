#ifndef TWILIGHT_APPS_CALIBRATE_H_
#define TWILIGHT_APPS_CALIBRATE_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "lab_stats.h"
#include "telemetry.h"
#include "twilight/engine.h"

namespace twilight::app {

/// Values of p that calibration walks over, ascending.
[[nodiscard]] std::span<const float> p_ladder();
/// Where it starts.
inline constexpr float kFirstP = 0.85F;

/// What one policy did on one part of the text.
struct Trial {
  SparsePolicy policy;
  MeanError loss;         ///< nll above dense, nats a token, paired
  double divergence = 0;  ///< mean KL of dense to this policy's next-token distribution, nats
  double ppl = 0;
  DecodeTotals totals;
  Telemetry telemetry;
  std::vector<double> layer_bytes;  ///< [layers] bytes read a step
  double milliseconds = 0;          ///< of a step that is not audited, median

  /// Perplexity over dense minus 1.
  [[nodiscard]] double ppl_change() const;
  [[nodiscard]] double ppl_change_half_width() const;
  /// Whether the loss stays within log(1 + target), its standard error included.
  [[nodiscard]] bool within(double target) const;
};

/// A stretch of text after a prompt, and dense attention's predictions on it.
class TextPart {
 public:
  /// Reads `tokens` but the last through the decode path after `prompt`, densely. False from
  /// `progress` stops it: the part is then empty.
  TextPart(Engine& engine, const Sequence& prompt, std::span<const std::int32_t> tokens,
           const Progress& progress);

  /// The same with a policy over the first `positions` (all for 0), compared with dense; audits one
  /// step in `audit_every`. Throws Error(kInternal) where `progress` stopped it.
  [[nodiscard]] Trial run(const SparsePolicy& policy, std::int32_t audit_every,
                          std::size_t positions, const Progress& progress);

  [[nodiscard]] bool empty() const { return log_probs_.empty(); }
  [[nodiscard]] std::size_t positions() const { return tokens_.size() - 1; }
  [[nodiscard]] double dense_ppl() const;
  [[nodiscard]] double dense_milliseconds() const { return dense_milliseconds_; }

 private:
  Engine& engine_;
  const Sequence& prompt_;
  std::span<const std::int32_t> tokens_;
  std::vector<float> log_probs_;  // [positions, vocab] of dense attention
  double dense_milliseconds_ = 0;
};

/// Choice of a rung for each layer: `bytes` and `loss` are [layers][rungs]; the choice with the
/// fewest bytes whose losses add up to at most `budget`, found greedily by bytes saved per loss
/// added, from the rungs `start` [layers] on.
[[nodiscard]] std::vector<std::size_t> choose_rungs(const std::vector<std::vector<double>>& bytes,
                                                    const std::vector<std::vector<double>>& loss,
                                                    std::vector<std::size_t> start, double budget);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_CALIBRATE_H_
