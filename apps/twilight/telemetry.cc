#include "telemetry.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "markup.h"

namespace twilight::app {
namespace {

// Estimates that claim this much more mass than the audit finds are worth a line. Rounding of 4-bit
// estimates moves masses by less than a hundredth.
constexpr double kDriftWarning = 0.05;

std::string percent(double share) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f %%", share * 100);
  return text;
}

}  // namespace

bool cap_hit(const SparsePolicy& policy, const LayerStats& stats) {
  if (is_dense(stats.path) || policy.max_candidates <= policy.min_candidates) return false;
  if (policy.selector == "full" || policy.selector == "streaming") return false;
  const double wanted = std::ceil(policy.candidate_fraction * stats.num_tokens);
  if (policy.candidate_mass <= 0) return wanted > policy.max_candidates;
  const double budget = std::clamp(wanted, static_cast<double>(policy.min_candidates),
                                   static_cast<double>(policy.max_candidates));
  return std::any_of(stats.candidates.begin(), stats.candidates.end(),
                     [&](std::int32_t count) { return count >= budget; });
}

void Telemetry::add(const SparsePolicy& policy, const LayerStats& stats) {
  if (is_dense(stats.path)) {
    ++dense[std::string(step_path_name(stats.path))];
    return;
  }
  ++sparse;
  cap_hits += cap_hit(policy, stats) ? 1 : 0;
  for (std::size_t h = 0; h < stats.true_mass.size(); ++h) {
    estimated_mass_sum += static_cast<double>(stats.estimated_mass[h]);
    true_mass_sum += static_cast<double>(stats.true_mass[h]);
    ++audited_heads;
  }
}

void Telemetry::add_step(const Engine& engine) {
  const std::int64_t before = audited_heads;
  for (std::int32_t layer = 0; layer < engine.model().info().num_layers; ++layer) {
    for (const LayerStats& stats : engine.last_stats(layer)) add(engine.policy(), stats);
  }
  ++steps;
  audited_steps += audited_heads > before ? 1 : 0;
}

void Telemetry::merge(const Telemetry& other) {
  sparse += other.sparse;
  for (const auto& [reason, count] : other.dense) dense[reason] += count;
  cap_hits += other.cap_hits;
  steps += other.steps;
  audited_steps += other.audited_steps;
  audited_heads += other.audited_heads;
  estimated_mass_sum += other.estimated_mass_sum;
  true_mass_sum += other.true_mass_sum;
}

double Telemetry::estimated_mass() const {
  return audited_heads == 0 ? 1 : estimated_mass_sum / static_cast<double>(audited_heads);
}

double Telemetry::true_mass() const {
  return audited_heads == 0 ? 1 : true_mass_sum / static_cast<double>(audited_heads);
}

nlohmann::ordered_json Telemetry::json() const {
  nlohmann::ordered_json out;
  out["sparse_layer_steps"] = sparse;
  out["dense_layer_steps"] = nlohmann::ordered_json::object();
  for (const auto& [reason, count] : dense) out["dense_layer_steps"][reason] = count;
  out["cap_hits"] = cap_hits;
  out["steps"] = steps;
  out["audited_steps"] = audited_steps;
  out["audited_heads"] = audited_heads;
  out["audited_estimated_mass_sum"] = estimated_mass_sum;
  out["audited_true_mass_sum"] = true_mass_sum;
  return out;
}

Telemetry Telemetry::from_json(const nlohmann::ordered_json& json) {
  Telemetry out;
  json.at("sparse_layer_steps").get_to(out.sparse);
  for (const auto& [reason, count] : json.at("dense_layer_steps").items()) {
    out.dense[reason] = count.get<std::int64_t>();
  }
  json.at("cap_hits").get_to(out.cap_hits);
  json.at("steps").get_to(out.steps);
  json.at("audited_steps").get_to(out.audited_steps);
  json.at("audited_heads").get_to(out.audited_heads);
  json.at("audited_estimated_mass_sum").get_to(out.estimated_mass_sum);
  json.at("audited_true_mass_sum").get_to(out.true_mass_sum);
  return out;
}

std::vector<std::string> Telemetry::warnings(const SparsePolicy& policy) const {
  std::vector<std::string> out;
  if (policy.is_dense() || steps == 0) return out;
  if (sparse == 0) out.emplace_back("nothing ran sparse");
  if (cap_hits > 0) {
    out.push_back("candidate cap of " + grouped(policy.max_candidates) + " tokens hit in " +
                  percent(static_cast<double>(cap_hits) / static_cast<double>(sparse)) +
                  " of sparse layer steps");
  }
  if (audited_heads > 0 && policy.prune && estimated_mass() - true_mass() > kDriftWarning) {
    const bool all = policy.selector == "full" || policy.selector == "oracle";
    out.push_back("true mass " + percent(true_mass()) + " where " + percent(estimated_mass()) +
                  " was estimated: " +
                  (all ? "the key estimates drift" : "candidates or key estimates miss the rest"));
  }
  return out;
}

std::string Telemetry::details(const SparsePolicy& policy) const {
  if (policy.is_dense()) return "";
  std::string out;
  for (const auto& [reason, count] : dense) out += "; " + grouped(count) + " dense: " + reason;
  if (audited_heads > 0) {
    out += "; true mass " + percent(true_mass()) + " (" + grouped(audited_steps) + " of " +
           grouped(steps) + " steps audited)";
  } else {
    out += "; estimates not audited";
  }
  for (const std::string& warning : warnings(policy)) out += "; WARNING: " + warning;
  return out;
}

std::string Telemetry::line(const SparsePolicy& policy) const {
  if (policy.is_dense()) return "";
  std::int64_t total = sparse;
  for (const auto& [reason, count] : dense) total += count;
  return policy.name + ": " + grouped(sparse) + " of " + grouped(total) + " layer steps sparse" +
         details(policy);
}

nlohmann::ordered_json Telemetry::report(const SparsePolicy& policy) const {
  nlohmann::ordered_json out = json();
  out["warnings"] = warnings(policy);
  return out;
}

StepAudit::StepAudit(Engine& engine, std::int32_t every) : engine_(engine), every_(every) {
  audited_ = every_ > 0;
  engine_.collect_stats(true, audited_);
}

StepAudit::~StepAudit() {
  try {
    engine_.collect_stats(true, false);
  } catch (...) {  // a destructor may not throw; the engine is unusable then anyway
  }
}

void StepAudit::after_step() {
  telemetry_.add_step(engine_);
  ++step_;
  audited_ = every_ > 0 && step_ % every_ == 0;
  engine_.collect_stats(true, audited_);
}

}  // namespace twilight::app
