#ifndef TWILIGHT_POLICY_H_
#define TWILIGHT_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "twilight/export.h"

namespace twilight {

/// How a decode step chooses the tokens it attends to. A plain value: copy it, change fields, pass
/// it on. `make_policy` gives the presets; `validate_policy` says what is wrong with one.
struct SparsePolicy {
  /// Name of the preset it came from, for reports.
  std::string name = "dense";

  /// "dense" reads everything and ignores the rest. Otherwise a selector scores pages and yields
  /// candidates: "full" (every page), "quest" (min / max bounds), "centroid" (mean and most deviant
  /// key), "half_centroid" and "sub_centroid" (means of half and of quarter pages), "streaming"
  /// (sinks and recent pages alone), "double_sparsity" (logits on a few label channels), "oracle"
  /// (true weights, reads every key: for tests and studies).
  std::string selector = "dense";

  /// Candidate budget in tokens: clamp(ceil(candidate_fraction * N), min_candidates,
  /// max_candidates), rounded up to pages. Only for selectors that rank pages.
  double candidate_fraction = 0.25;
  std::int32_t min_candidates = 1024;
  std::int32_t max_candidates = 8192;
  /// Stop taking candidate pages once they hold this estimated share of the attention mass, in
  /// [0, 1); the budget above stays the cap and min_candidates the floor. 0: always the whole
  /// budget. Only for the centroid selectors, whose scores are masses.
  double candidate_mass = 0;

  /// Whether candidates are pruned to their top-p set or all kept.
  bool prune = true;
  /// "per_head": the top-p set of each query head, union over the KV head's group. "group_mean":
  /// the top-p set of the group's mean weights.
  std::string criterion = "per_head";
  /// Whether the candidates that pruning drops still count, as their page's mean value times their
  /// estimated mass.
  bool tail = false;
  /// Whether pages outside the candidates count too, by the mass their summary predicts; needs
  /// `tail` and a centroid selector, whose scores are masses.
  bool far_tail = false;
  /// Such pages are left out below this multiple of the mean page's share, 0 or more.
  float far_floor = 0.2F;
  /// Attention mass to keep among the candidates, in (0, 1].
  float p = 0.95F;
  /// p of single layers; empty, or one value a layer of the model (values in (0, 1]).
  std::vector<float> layer_p;
  /// Fewest tokens a query head keeps, forced ones included, 0 or more.
  std::int32_t min_tokens = 64;

  /// Bits of the key estimates: 2 (rotated, centred on the page), 4, 8, or 16 for the exact keys.
  std::int32_t key_bits = 4;
  /// Bits of Quest summaries: 16 (bf16) or 4.
  std::int32_t summary_bits = 16;

  /// Channels a KV head that "double_sparsity" scores by: a multiple of 16 up to 128.
  std::int32_t num_labels = 0;
  /// Their numbers below D, [layers, Hkv, num_labels], ascending in each head. `twilight calibrate
  /// --labels` finds them for a model; there is no default.
  std::vector<std::int32_t> labels;

  /// Always attended: the first tokens, the last full pages and the open page.
  std::int32_t sink_tokens = 16;
  std::int32_t recent_pages = 3;

  /// Layers from the bottom that stay dense.
  std::int32_t dense_layers = 2;
  /// Sequences of at most this many tokens stay dense. kDenseBelowAuto: the engine measures where
  /// sparse starts to win on this machine; the library alone takes it as 0.
  std::int32_t dense_below_tokens = kDenseBelowAuto;

  static constexpr std::int32_t kDenseBelowAuto = -1;

  /// p of a layer: layer_p where given, else p.
  [[nodiscard]] float p_of_layer(std::int32_t layer) const {
    const auto i = static_cast<std::size_t>(layer);
    return i < layer_p.size() ? layer_p[i] : p;
  }
  [[nodiscard]] bool is_dense() const { return selector == "dense"; }

  bool operator==(const SparsePolicy&) const = default;
};

/// Presets: "dense"; "adaptive" (sub_centroid candidates N / 4, 1,024 to 8,192, 2-bit estimates, p
/// .85 of the group's mean, tail); "paper" (Quest candidates N / 4, 1,024 to 8,192, 4-bit
/// estimates, p .95 per head); "paper-full" (every token a candidate); "quest:K" (the best K
/// tokens, no pruning); "streaming". Throws Error(kInvalidArgument) for another name.
[[nodiscard]] TWILIGHT_API SparsePolicy make_policy(const std::string& preset);

/// Names `make_policy` takes, for help texts.
[[nodiscard]] TWILIGHT_API std::vector<std::string> policy_names();

/// Throws Error(kInvalidArgument) naming the first field outside its range.
TWILIGHT_API void validate_policy(const SparsePolicy& policy);

}  // namespace twilight

#endif  // TWILIGHT_POLICY_H_
