#include "twilight/policy.h"

#include <charconv>

#include "core/check.h"
#include "sparse/selector.h"

namespace twilight {
namespace {

constexpr std::int32_t kMaxTokens = 1 << 30;

std::int32_t parse_budget(const std::string& preset, std::size_t prefix) {
  std::int32_t tokens = 0;
  const char* begin = preset.data() + prefix;
  const char* end = preset.data() + preset.size();
  const auto [stop, error] = std::from_chars(begin, end, tokens);
  require(error == std::errc() && stop == end && tokens >= 1 && tokens <= kMaxTokens, "attention",
          "budget of quest:K, got '", preset, "', accepted a number of tokens from 1 to ",
          kMaxTokens);
  return tokens;
}

// The shape in layers and KV heads is settled where there is a cache.
void validate_labels(const SparsePolicy& policy) {
  require(policy.num_labels != 0 || !policy.labels.empty(), "policy",
          "selector double_sparsity without label channels, accepted a profile with them: twilight "
          "calibrate --labels --out FILE, then --profile FILE");
  const std::int32_t count = policy.num_labels;
  require(count >= kLabelUnit && count <= kMaxLabels && count % kLabelUnit == 0, "policy",
          "num_labels, got ", count, ", accepted multiples of ", kLabelUnit, " up to ", kMaxLabels);
  const auto row = static_cast<std::size_t>(count);
  require(!policy.labels.empty() && policy.labels.size() % row == 0, "policy", "labels, got ",
          policy.labels.size(), " channels, accepted ", count, " for each layer and KV head");
  for (std::size_t i = 0; i < policy.labels.size(); ++i) {
    const std::int32_t least = i % row == 0 ? 0 : policy.labels[i - 1] + 1;
    require(policy.labels[i] >= least && policy.labels[i] < 512, "policy", "labels[", i, "], got ",
            policy.labels[i], ", accepted ", least, " to 511, ascending in each head");
  }
}

}  // namespace

std::vector<std::string> policy_names() {
  return {"dense", "adaptive", "paper", "paper-full", "quest:K", "streaming"};
}

SparsePolicy make_policy(const std::string& preset) {
  SparsePolicy policy;
  policy.name = preset;
  if (preset == "dense") return policy;
  if (preset == "paper") {
    policy.selector = "quest";
    return policy;
  }
  if (preset == "paper-full") {
    policy.selector = "full";
    return policy;
  }
  if (preset == "adaptive") {
    policy.selector = "sub_centroid";
    policy.criterion = "group_mean";
    policy.p = 0.85F;
    policy.tail = true;
    policy.key_bits = 2;
    return policy;
  }
  if (preset == "streaming") {
    policy.selector = "streaming";
    policy.prune = false;
    return policy;
  }
  for (const char* prefix : {"quest:", "quest-"}) {
    if (preset.rfind(prefix, 0) == 0) {
      policy.selector = "quest";
      policy.prune = false;
      policy.candidate_fraction = 0;
      policy.min_candidates = policy.max_candidates = parse_budget(preset, 6);
      return policy;
    }
  }
  std::string accepted;
  for (const std::string& name : policy_names()) accepted += (accepted.empty() ? "" : ", ") + name;
  fail(ErrorCode::kInvalidArgument, "attention", "unknown preset, got '", preset, "', accepted ",
       accepted);
}

void validate_policy(const SparsePolicy& policy) {
  if (policy.is_dense()) return;
  const auto selector = make_selector(policy);
  const auto in_unit = [](const std::string& name, float p) {
    require(p > 0 && p <= 1, "policy", name, ", got ", p, ", accepted above 0 to 1");
  };
  const auto in_range = [](const char* name, std::int64_t value, std::int64_t min,
                           std::int64_t max) {
    require(value >= min && value <= max, "policy", name, ", got ", value, ", accepted ", min,
            " to ", max);
  };
  in_unit("p", policy.p);
  for (std::size_t i = 0; i < policy.layer_p.size(); ++i) {
    in_unit(cat("layer_p[", i, "]"), policy.layer_p[i]);
  }
  require(policy.candidate_fraction >= 0 && policy.candidate_fraction <= 1, "policy",
          "candidate_fraction, got ", policy.candidate_fraction, ", accepted 0 to 1");
  in_range("min_candidates", policy.min_candidates, 0, kMaxTokens);
  in_range("max_candidates", policy.max_candidates, policy.min_candidates, kMaxTokens);
  require(policy.candidate_mass >= 0 && policy.candidate_mass < 1, "policy", "candidate_mass, got ",
          policy.candidate_mass, ", accepted 0 to below 1");
  require(policy.candidate_mass == 0 || num_centroids(selector->summary()) > 0, "policy",
          "candidate_mass with selector '", policy.selector,
          "', accepted centroid, half_centroid, sub_centroid");
  if (selector->summary() == SummaryKind::kLabels) validate_labels(policy);
  require(policy.criterion == "per_head" || policy.criterion == "group_mean", "policy",
          "criterion, got '", policy.criterion, "', accepted per_head, group_mean");
  require(
      !policy.tail || policy.prune, "policy",
      "tail without pruning: nothing is dropped that it could stand for, accepted prune = true");
  require(!policy.far_tail || (policy.tail && num_centroids(selector->summary()) > 0), "policy",
          "far_tail with tail ", policy.tail ? "on" : "off", " and selector '", policy.selector,
          "', accepted with tail on and selector centroid, half_centroid, sub_centroid");
  require(policy.far_floor >= 0 && policy.far_floor <= 1e6F, "policy", "far_floor, got ",
          policy.far_floor, ", accepted 0 to 1e6");
  in_range("min_tokens", policy.min_tokens, 0, kMaxTokens);
  in_range("sink_tokens", policy.sink_tokens, 0, kMaxTokens);
  in_range("recent_pages", policy.recent_pages, 0, kMaxTokens);
  in_range("dense_layers", policy.dense_layers, 0, 4096);
  in_range("dense_below_tokens", policy.dense_below_tokens, SparsePolicy::kDenseBelowAuto,
           kMaxTokens);
  require(
      policy.key_bits == 2 || policy.key_bits == 4 || policy.key_bits == 8 || policy.key_bits == 16,
      "policy", "key_bits, got ", policy.key_bits, ", accepted 2, 4, 8, 16");
  require(policy.summary_bits == 4 || policy.summary_bits == 16, "policy", "summary_bits, got ",
          policy.summary_bits, ", accepted 4, 16");
}

}  // namespace twilight
