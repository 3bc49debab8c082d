#include "calibration.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <tuple>

#include "interrupt.h"
#include "markup.h"
#include "paths.h"
#include "profile.h"
#include "progress.h"
#include "table.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

// A choice by layer must save this share of the bytes to be worth its many numbers.
constexpr double kLeastSaving = 0.02;
// Fewest positions that layers are probed with, and their share of the part for choosing.
constexpr std::size_t kLeastProbe = 64, kProbeShare = 4;
constexpr std::int32_t kForkPages = 4;

std::string percent(double share) {
  return concat(share > 0 ? "+" : "", fixed(share * 100, 2), " %");
}

std::string change_of(const Trial& trial) {
  const double half = trial.ppl_change_half_width();
  return percent(trial.ppl_change()) + " \u00b1 " +
         (std::isfinite(half) ? fixed(half * 100, 2) : "?");
}

Json trial_json(const Trial& trial) {
  Json out;
  out["p"] = trial.policy.p;
  if (!trial.policy.layer_p.empty()) out["layer_p"] = trial.policy.layer_p;
  out["dense_layers"] = trial.policy.dense_layers;
  out["ppl"] = trial.ppl;
  out["ppl_change"] = trial.ppl_change();
  out["ppl_change_half_width"] = trial.ppl_change_half_width();
  out["divergence"] = trial.divergence;
  out["bytes_ratio_sparse_layers"] = trial.totals.sparse_bytes_ratio();
  out["bytes_ratio"] = trial.totals.bytes_ratio();
  out["kept_mean"] = trial.totals.kept_mean();
  out["union_mean"] = trial.totals.attended_mean();
  out["estimated_mass_mean"] = trial.totals.estimated_mass_mean();
  out["true_mass_mean"] = nullptr;
  if (trial.totals.true_mass_counted > 0) out["true_mass_mean"] = trial.totals.true_mass_mean();
  out["milliseconds_per_token"] = trial.milliseconds;
  return out;
}

std::vector<std::string> row_of(const std::string& name, const Trial& trial) {
  return {name,
          change_of(trial),
          fixed(trial.divergence, 4),
          fixed(trial.totals.sparse_bytes_ratio() * 100, 1) + " %",
          fixed(trial.totals.bytes_ratio() * 100, 1) + " %",
          fixed(trial.totals.kept_mean(), 0),
          trial.totals.true_mass_counted > 0 ? fixed(trial.totals.true_mass_mean(), 3) : "",
          fixed(trial.milliseconds, 2)};
}

SparsePolicy base_policy(const CalibrateFlags& flags) {
  SparsePolicy policy = flags.attention.policy();
  if (policy.is_dense() || !policy.prune) {
    throw Error(ErrorCode::kInvalidArgument, "[calibrate] preset, got '" + policy.name +
                                                 "', accepted one that prunes by p, e.g. paper");
  }
  if (flags.attention.p) {
    throw Error(ErrorCode::kInvalidArgument, "[calibrate] --attn-p is what calibrate finds, got " +
                                                 fixed(*flags.attention.p, 3) +
                                                 ", accepted no --attn-p");
  }
  // The sparse path is what is judged; what stays dense below some length is settled anew where
  // the profile is used.
  if (!flags.attention.dense_below) policy.dense_below_tokens = 0;
  return policy;
}

}  // namespace

EngineOptions engine_options(const CalibrateFlags& flags) {
  EngineOptions options;
  options.page_size = flags.attention.page_size();
  options.max_context = flags.context;
  options.cache_tokens = flags.context + kForkPages * options.page_size;
  return options;
}

Calibration::Calibration(const CalibrateFlags& flags, double target)
    : flags_(flags),
      target_(target),
      base_(base_policy(flags)),
      out_(flags.out.empty() ? OutputFile() : OutputFile(flags.out, flags.force)),
      device_(flags.common.device),
      model_(load_model(flags.model.empty() ? bundled_model() : flags.model, flags.common,
                        flags.attention)),
      engine_(device_, model_, engine_options(flags)) {}

SparsePolicy Calibration::policy_at(Place place) const {
  SparsePolicy policy = base_;
  policy.dense_layers = place.first;
  policy.p = p_ladder()[place.second];
  policy.layer_p.clear();
  return policy;
}

Trial Calibration::measure(TextPart& part, const SparsePolicy& policy, const std::string& what,
                           std::size_t positions) {
  ProgressBar bar(what, "tokens", !flags_.common.json);
  return part.run(policy, positions == 0 ? flags_.audit_every : 0, positions, bar.callback());
}

const Trial& Calibration::trial(TextPart& part, Place place) {
  const auto found = trials_.find(place);
  if (found != trials_.end()) return found->second;
  std::string what = "p = " + digits3(static_cast<double>(p_ladder()[place.second]));
  if (place.first != base_.dense_layers) what += ", dense layers " + std::to_string(place.first);
  return trials_.emplace(place, measure(part, policy_at(place), what)).first->second;
}

const Trial* Calibration::find(Place place) const {
  const auto found = trials_.find(place);
  return found == trials_.end() ? nullptr : &found->second;
}

// The lowest rung that keeps the target with the preset's dense layers, from kFirstP on down or up,
// and its neighbours for what too low and too high cost. None where not even the highest keeps it.
std::optional<Calibration::Place> Calibration::walk(TextPart& part) {
  const std::span<const float> ladder = p_ladder();
  const auto within = [&](std::size_t i) {
    return trial(part, {base_.dense_layers, i}).within(target_);
  };
  std::size_t at =
      static_cast<std::size_t>(std::find(ladder.begin(), ladder.end(), kFirstP) - ladder.begin());
  while (!within(at)) {
    if (at + 1 == ladder.size()) return std::nullopt;
    ++at;
  }
  while (at > 0 && within(at - 1)) --at;
  if (at + 1 < ladder.size()) (void)trial(part, {base_.dense_layers, at + 1});
  return Place{base_.dense_layers, at};
}

// Presets keep the bottom layers dense because a fixed share of their pages would miss much of
// their flat attention; top-p keeps more tokens there by itself, and what is saved there may pay
// for a higher p in all layers. The place that keeps the target with the fewest bytes over all
// layers, at the chosen p and above.
Calibration::Place Calibration::try_dense_layers(TextPart& part, Place chosen) {
  Place best = chosen;
  for (std::int32_t layers = 0; layers < chosen.first; ++layers) {
    for (std::size_t i = chosen.second; i < p_ladder().size(); ++i) {
      const Trial& tried = trial(part, {layers, i});
      if (tried.totals.bytes_ratio() >= trials_.at(best).totals.bytes_ratio()) break;
      if (!tried.within(target_)) continue;
      best = {layers, i};
      break;
    }
    if (best == Place{layers, chosen.second}) break;  // more dense layers only read more
  }
  return best;
}

// A p for each layer that reads less at no more loss than the chosen p for all, if there is one.
// Each sparse layer is moved a rung down and up alone; the divergences from dense are then taken to
// add up, and the outcome is measured as a whole before it is believed.
std::optional<Trial> Calibration::try_layers(TextPart& part, Place chosen) {
  const std::span<const float> ladder = p_ladder();
  const Trial& all = trials_.at(chosen);
  const std::size_t middle = chosen.second;
  const std::size_t low = middle == 0 ? 0 : middle - 1;
  const std::size_t high = std::min(middle + 1, ladder.size() - 1);
  const std::vector<std::size_t> options = {low, middle, high};
  const auto layers = static_cast<std::size_t>(model_.info().num_layers);
  const std::size_t positions = std::max(kLeastProbe, part.positions() / kProbeShare);
  const SparsePolicy global = policy_at(chosen);
  const Trial base = measure(part, global, "Layers, all", positions);
  std::vector<std::vector<double>> bytes(layers), loss(layers);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    for (const std::size_t option : options) {
      bytes[layer].push_back(base.layer_bytes[layer]);
      loss[layer].push_back(0);
      if (option == middle || static_cast<std::int32_t>(layer) < global.dense_layers) continue;
      SparsePolicy policy = global;
      policy.layer_p.assign(layers, global.p);
      policy.layer_p[layer] = ladder[option];
      const Trial moved = measure(part, policy, "Layer " + std::to_string(layer), positions);
      bytes[layer].back() = moved.layer_bytes[layer];
      loss[layer].back() = moved.divergence - base.divergence;
    }
  }
  // From the dearest choice down, within the loss of the p for all.
  const std::vector<std::size_t> rungs =
      choose_rungs(bytes, loss, std::vector<std::size_t>(layers, 2), 0);
  SparsePolicy policy = global;
  policy.layer_p.assign(layers, global.p);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    if (static_cast<std::int32_t>(layer) >= global.dense_layers) {
      policy.layer_p[layer] = ladder[options[rungs[layer]]];
    }
  }
  Trial by_layer = measure(part, policy, "p by layer");
  const double saving = 1 - static_cast<double>(by_layer.totals.bytes_read) /
                                static_cast<double>(all.totals.bytes_read);
  layers_note_ = "p by layer: " + change_of(by_layer) + ", bytes " + percent(-saving) +
                 " against p for all, divergence " + fixed(by_layer.divergence, 4) + " against " +
                 fixed(all.divergence, 4);
  if (saving < kLeastSaving || !by_layer.within(target_) ||
      by_layer.divergence > all.divergence * 1.02) {
    layers_note_ += "; not worth it";
    return std::nullopt;
  }
  return by_layer;
}

// What the neighbours of the chosen p cost, with its dense layers if they were measured, else with
// the preset's.
std::string Calibration::advice(Place chosen) const {
  const auto neighbours = [&](std::int32_t layers) {
    const std::size_t i = chosen.second;
    return std::pair(i == 0 ? nullptr : find({layers, i - 1}), find({layers, i + 1}));
  };
  std::int32_t layers = chosen.first;
  auto [low, high] = neighbours(layers);
  if (low == nullptr && high == nullptr) {
    layers = base_.dense_layers;
    std::tie(low, high) = neighbours(layers);
  }
  const Trial* at = find({layers, chosen.second});
  if (at == nullptr) return "";
  const std::string where =
      layers == chosen.first ? "" : " (dense layers " + std::to_string(layers) + ")";
  const auto bytes = [](const Trial& each) { return each.totals.sparse_bytes_ratio(); };
  const auto name = [](const Trial& each) { return digits3(static_cast<double>(each.policy.p)); };
  std::string out;
  if (low != nullptr) {
    out += "Too low:  p " + name(*low) + " reads " + percent(bytes(*low) / bytes(*at) - 1) +
           " bytes and loses " + change_of(*low) + " perplexity instead of " +
           percent(at->ppl_change()) + where + "\n";
  }
  if (high != nullptr) {
    out += "Too high: p " + name(*high) + " loses " + change_of(*high) + " and reads " +
           percent(bytes(*high) / bytes(*at) - 1) + " bytes" + where + "\n";
  }
  return out;
}

void Calibration::print(const TextPart& part, const TextPart& held_out, const Trial& proposal,
                        const Trial& check, Place chosen) const {
  Table table;
  table.add({"p", "ppl over dense", "KL", "bytes", "all layers", "kept", "true mass", "ms/token"});
  bool fewer_dense = false;
  for (const bool of_preset : {true, false}) {
    for (const auto& [place, tried] : trials_) {
      if ((place.first == base_.dense_layers) != of_preset) continue;
      std::string name = digits3(static_cast<double>(p_ladder()[place.second]));
      if (!of_preset) name += ", dense layers " + std::to_string(place.first);
      table.add(row_of(name + (place == chosen ? " *" : ""), tried));
      fewer_dense = fewer_dense || !of_preset;
    }
  }
  if (!proposal.policy.layer_p.empty()) table.add(row_of("by layer", proposal));
  table.add({"dense", "ppl " + fixed(part.dense_ppl(), 3), "", "100 %", "100 %", "", "",
             fixed(part.dense_milliseconds(), 2)});
  table.add(row_of("held out", check));
  std::printf("%s\n", table.text().c_str());
  std::printf("Proposed: %s with p %s", base_.name.c_str(),
              digits3(static_cast<double>(p_ladder()[chosen.second])).c_str());
  if (!proposal.policy.layer_p.empty()) {
    std::printf(", by layer");
    for (const float p : proposal.policy.layer_p) {
      std::printf(" %s", digits3(static_cast<double>(p)).c_str());
    }
  }
  if (fewer_dense) std::printf(", dense layers %d", proposal.policy.dense_layers);
  std::printf("\n%s", advice(chosen).c_str());
  if (!layers_note_.empty()) std::printf("Layers:   %s\n", layers_note_.c_str());
  std::printf(
      "Held out: %s over dense ppl %.3f on %zu tokens not used for choosing; target %s %s\n",
      change_of(check).c_str(), held_out.dense_ppl(), held_out.positions(),
      percent(target_).c_str(), check.loss.mean <= std::log1p(target_) ? "kept" : "MISSED");
}

int Calibration::run() {
  const std::string path = flags_.text.empty() ? bundled_novel() : flags_.text;
  std::vector<std::int32_t> tokens = model_.encode(read_text(path));
  const auto last = static_cast<std::size_t>(flags_.last);
  const auto context = static_cast<std::size_t>(flags_.context);
  if (context < 2 * last + 16) {
    throw Error(ErrorCode::kInvalidArgument,
                "[calibrate] --last, got " + std::to_string(last) + ", accepted 1 to " +
                    std::to_string(context < 18 ? 0 : (context - 16) / 2) + " in this --ctx");
  }
  if (tokens.size() < context + 1) {
    throw Error(ErrorCode::kInvalidArgument,
                "[calibrate] the text is too short, got " + std::to_string(tokens.size()) +
                    " tokens of " + path + ", accepted at least " + std::to_string(context + 1));
  }
  tokens.resize(context + 1);
  const std::span<const std::int32_t> all(tokens);
  const std::size_t begin = context - 2 * last;
  Sequence prompt = engine_.cache().new_sequence();
  ProgressBar bar("Reading the text", "tokens", !flags_.common.json);
  if (engine_.prefill(prompt, all.first(begin), {}, bar.callback()) != Engine::Status::kOk) {
    return kInterruptedExit;
  }
  bar.clear();
  TextPart part(engine_, prompt, all.subspan(begin, last + 1), bar.callback());
  bar.clear();
  if (part.empty()) return kInterruptedExit;
  std::optional<Place> chosen = walk(part);
  if (!chosen) {
    const Trial& best = trials_.rbegin()->second;
    throw Error(ErrorCode::kUnsupported,
                "[calibrate] no p keeps the target of " + percent(target_) + ": p " +
                    digits3(static_cast<double>(best.policy.p)) + " loses " + change_of(best) +
                    "; the candidates lose the rest (raise --candidates), or --last is too small "
                    "to tell");
  }
  if (!flags_.attention.dense_layers) chosen = try_dense_layers(part, *chosen);
  Trial proposal = trials_.at(*chosen);
  if (!flags_.no_layers) {
    if (std::optional<Trial> by_layer = try_layers(part, *chosen)) proposal = std::move(*by_layer);
  }
  // The part not used for choosing lies behind the other.
  Sequence longer = prompt.fork();
  if (engine_.prefill(longer, all.subspan(begin, last), {}, bar.callback()) !=
      Engine::Status::kOk) {
    return kInterruptedExit;
  }
  TextPart held_out(engine_, longer, all.subspan(begin + last), bar.callback());
  bar.clear();
  if (held_out.empty()) return kInterruptedExit;
  const Trial check = measure(held_out, proposal.policy, "Held out");

  Json report;
  report["model"] = model_.info().path;
  report["device"] = device_.description();
  report["text"] = path;
  report["ctx"] = flags_.context;
  report["last"] = flags_.last;
  report["attention"] = base_.name;
  report["target"] = target_;
  report["dense_ppl"] = part.dense_ppl();
  report["dense_milliseconds_per_token"] = part.dense_milliseconds();
  for (const auto& [place, tried] : trials_) {
    const bool of_preset = place.first == base_.dense_layers;
    report[of_preset ? "tried" : "tried_dense_layers"].push_back(trial_json(tried));
  }
  report["proposed"] = trial_json(proposal);
  report["layers"] = layers_note_;
  report["held_out"] = trial_json(check);
  report["held_out"]["dense_ppl"] = held_out.dense_ppl();
  report["held_out"]["target_kept"] = check.loss.mean <= std::log1p(target_);
  report["telemetry"] = proposal.telemetry.report(proposal.policy);
  if (out_.is_open()) {
    Profile profile;
    profile.policy = proposal.policy;
    profile.policy.dense_below_tokens =
        flags_.attention.dense_below ? base_.dense_below_tokens : SparsePolicy::kDenseBelowAuto;
    profile.page_size = flags_.attention.page_size();
    profile.model = profile_model(model_.info());
    out_.commit(profile_text(profile, report));
  }
  if (flags_.common.json) {
    std::printf("%s\n", report.dump(2).c_str());
    return 0;
  }
  print(part, held_out, proposal, check, *chosen);
  std::fflush(stdout);
  std::fprintf(stderr, "%s%s\n", proposal.telemetry.line(proposal.policy).c_str(),
               out_.is_open() ? ("; profile in " + out_.path()).c_str() : "");
  return 0;
}

}  // namespace twilight::app
