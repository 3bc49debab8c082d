#include "stats_json.h"

#include <cstdio>

namespace twilight::app {

nlohmann::ordered_json policy_json(const SparsePolicy& policy) {
  nlohmann::ordered_json out;
  out["name"] = policy.name;
  if (policy.is_dense()) return out;
  out["selector"] = policy.selector;
  if (policy.selector != "full" && policy.selector != "streaming") {
    out["candidate_fraction"] = policy.candidate_fraction;
    out["min_candidates"] = policy.min_candidates;
    out["max_candidates"] = policy.max_candidates;
  }
  if (policy.selector == "quest") out["summary_bits"] = policy.summary_bits;
  if (policy.candidate_mass > 0) out["candidate_mass"] = policy.candidate_mass;
  out["prune"] = policy.prune;
  if (policy.prune) {
    out["p"] = policy.p;
    if (!policy.layer_p.empty()) out["layer_p"] = policy.layer_p;
    out["criterion"] = policy.criterion;
    out["tail"] = policy.tail;
    if (policy.far_tail) out["far_floor"] = policy.far_floor;
    out["key_bits"] = policy.key_bits;
    out["min_tokens"] = policy.min_tokens;
  }
  out["sink_tokens"] = policy.sink_tokens;
  out["recent_pages"] = policy.recent_pages;
  out["dense_layers"] = policy.dense_layers;
  out["dense_below_tokens"] = policy.dense_below_tokens;
  return out;
}

nlohmann::ordered_json totals_json(const DecodeTotals& totals) {
  nlohmann::ordered_json out;
  out["decode_steps"] = totals.steps;
  out["sparse_layer_steps"] = totals.sparse_layers;
  out["dense_layer_steps"] = totals.dense_layers;
  out["bytes_read"] = totals.bytes_read;
  out["bytes_dense"] = totals.bytes_dense;
  out["bytes_ratio"] = totals.bytes_ratio();
  out["bytes_ratio_sparse_layers"] = totals.sparse_bytes_ratio();
  out["candidates_mean"] = totals.candidates_mean();
  out["kept_mean"] = totals.kept_mean();
  out["union_mean"] = totals.attended_mean();
  out["estimated_mass_mean"] = totals.estimated_mass_mean();
  if (totals.true_mass_counted > 0) out["true_mass_mean"] = totals.true_mass_mean();
  return out;
}

std::string summary_line(const nlohmann::ordered_json& report) {
  const auto& attention = report["attention"];
  char line[256];
  std::snprintf(line, sizeof(line),
                "%d prompt + %d new tokens (%s); prefill %.0f tok/s, decode %.1f tok/s; "
                "%.1f %% of dense KV bytes read",
                report["prompt_tokens"].get<int>(), report["generated_tokens"].get<int>(),
                report["finish_reason"].get<std::string>().c_str(),
                report["prefill_tokens_per_second"].get<double>(),
                report["decode_tokens_per_second"].get<double>(),
                attention["bytes_ratio"].get<double>() * 100);
  std::string text = line;
  const auto sparse = attention["sparse_layer_steps"].get<std::int64_t>();
  const auto dense = attention["dense_layer_steps"].get<std::int64_t>();
  if (report["policy"]["name"] != "dense" && sparse + dense > 0) {
    std::snprintf(line, sizeof(line), "; %lld of %lld layer steps sparse",
                  static_cast<long long>(sparse), static_cast<long long>(sparse + dense));
    text += line;
  }
  return text;
}

void StepRecorder::record(const Engine& engine) {
  if (!enabled_) return;
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (std::int32_t layer = 0; layer < engine.model().info().num_layers; ++layer) {
    for (const LayerStats& stats : engine.last_stats(layer).first(1)) {
      nlohmann::ordered_json entry;
      entry["layer"] = layer;
      entry["path"] = step_path_name(stats.path);
      entry["tokens"] = stats.num_tokens;
      entry["bytes_read"] = stats.bytes_read;
      entry["bytes_dense"] = stats.bytes_dense;
      entry["candidates"] = stats.candidates;
      entry["union"] = stats.attended;
      entry["kept"] = stats.kept;
      entry["estimated_mass"] = stats.estimated_mass;
      if (!stats.true_mass.empty()) entry["true_mass"] = stats.true_mass;
      layers.push_back(std::move(entry));
    }
  }
  steps_.push_back(std::move(layers));
}

}  // namespace twilight::app
