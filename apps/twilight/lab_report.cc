#include "lab_report.h"

#include <algorithm>
#include <cmath>

#include "markup.h"
#include "stats_json.h"
#include "table.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

// Losses of neighbouring tokens are alike over about a sentence.
constexpr std::size_t kLossBlock = 16;

Json score_json(const Task& task, const PresetSummary& s) {
  Json out;
  if (task.has_score()) {
    out["score"] = s.score;
    out["half_width"] = s.interval.half_width();
    out["interval"] = {s.interval.low, s.interval.high};
    out["found"] = s.found;
    out["trials"] = s.trials;
    out["questions"] = s.questions;
    if (s.digits > 0) {
      out["digits"] = s.digits;
      out["digits_right"] = s.digits_right;
    }
    if (s.score_change) {
      out["score_change"] = s.score_change->mean;
      out["score_change_half_width"] = s.score_change_half_width;
    }
    if (s.same_answers) out["same_answers"] = *s.same_answers;
  } else {
    out["score"] = out["found"] = out["trials"] = nullptr;
  }
  if (task.has_ppl()) {
    out["ppl"] = std::exp(s.nll.mean);
    out["nll"] = s.nll.mean;
    out["nll_half_width"] = s.nll.half_width();
    out["scored_tokens"] = s.nll.count;
    if (s.nll_change) {
      out["ppl_change"] = std::expm1(s.nll_change->mean);
      out["ppl_change_half_width"] = std::exp(s.nll_change->mean) * s.nll_change->half_width();
    }
  } else {
    out["ppl"] = nullptr;
  }
  return out;
}

Json found_per_depth(const Lab& lab, std::size_t preset) {
  Json out = Json::array();
  for (std::size_t depth = 0; depth < lab.depths().size(); ++depth) {
    const PresetSummary s =
        summarise(lab, preset, [&](const CellPlace& place) { return place.depth == depth; });
    out.push_back({{"depth", lab.depths()[depth]}, {"found", s.found}, {"trials", s.trials}});
  }
  return out;
}

// One entry a text, context and depth; of a run with one of each the result says it already.
Json grid_json(const Lab& lab, std::size_t preset) {
  Json out = Json::array();
  for (std::size_t text = 0; text < lab.text_names().size(); ++text) {
    for (const std::int32_t context : lab.contexts()) {
      for (std::size_t depth = 0; depth < lab.depths().size(); ++depth) {
        const PresetSummary s = summarise(lab, preset, [&](const CellPlace& place) {
          return place.text == text && place.context == context && place.depth == depth;
        });
        Json entry;
        if (lab.text_names().size() > 1) entry["text"] = lab.text_names()[text];
        entry["ctx"] = context;
        if (lab.task().has_depth()) entry["depth"] = lab.depths()[depth];
        const Json scores = score_json(lab.task(), s);
        for (const auto& [name, value] : scores.items()) {
          if (!value.is_null()) entry[name] = value;
        }
        entry["bytes_ratio"] = s.totals.bytes_ratio();
        entry["bytes_ratio_sparse_layers"] = s.totals.sparse_bytes_ratio();
        out.push_back(std::move(entry));
      }
    }
  }
  return out;
}

std::string signed_percent(double value) {
  return concat(value < 0 ? "" : "+", fixed(value * 100, 2), " %");
}

std::string with_error(const std::string& value, const std::string& error) {
  return value + " \u00b1 " + (error.find("nan") == std::string::npos ? error : "?");
}

// Scores of a preset: a row a text and context, a column a depth.
std::string grid_table(const Lab& lab) {
  Table table;
  std::vector<std::string> heading = {"score"};
  for (const double depth : lab.depths()) {
    heading.push_back(lab.task().has_depth() ? "depth " + digits3(depth) : "score");
  }
  table.add(heading);
  for (std::size_t preset = 0; preset < lab.presets().size(); ++preset) {
    for (std::size_t text = 0; text < lab.text_names().size(); ++text) {
      for (const std::int32_t context : lab.contexts()) {
        std::string name = lab.presets()[preset].label;
        if (lab.contexts().size() > 1) name += ", ctx " + std::to_string(context);
        if (lab.text_names().size() > 1) name += ", text " + std::to_string(text + 1);
        std::vector<std::string> row = {name};
        for (std::size_t depth = 0; depth < lab.depths().size(); ++depth) {
          const PresetSummary s = summarise(lab, preset, [&](const CellPlace& place) {
            return place.text == text && place.context == context && place.depth == depth;
          });
          row.push_back(lab.task().has_score()
                            ? with_error(fixed(s.score, 3), fixed(s.interval.half_width(), 3))
                            : fixed(std::exp(s.nll.mean), 3));
        }
        table.add(row);
      }
    }
  }
  return table.text();
}

}  // namespace

PresetSummary summarise(const Lab& lab, std::size_t preset, const PlaceFilter& filter) {
  PresetSummary out;
  const std::size_t baseline = lab.baseline();
  const bool compared = baseline < lab.presets().size() && baseline != preset;
  std::vector<double> scores, changes;
  std::vector<std::vector<double>> losses, loss_changes;
  std::int64_t answers = 0, same = 0, timed = 0;
  double seconds = 0;
  for (const CellPlace& place : lab.places()) {
    if (filter && !filter(place)) continue;
    const Cell& cell = lab.cell(place, preset);
    scores.push_back(cell.score);
    ++out.trials;
    out.questions += cell.questions;
    out.found += cell.score >= 1 ? 1 : 0;
    out.digits += cell.digits;
    out.digits_right += cell.digits_right;
    losses.push_back(cell.nll);
    out.totals.merge(cell.totals);
    out.telemetry.merge(cell.telemetry);
    seconds += cell.seconds;
    timed += cell.timed_steps;
    if (!compared) continue;
    const Cell& base = lab.cell(place, baseline);
    changes.push_back(cell.score - base.score);
    loss_changes.push_back(cell.nll);
    for (std::size_t i = 0; i < cell.nll.size(); ++i) loss_changes.back()[i] -= base.nll[i];
    for (std::size_t i = 0; i < cell.answers.size(); ++i) {
      ++answers;
      same += cell.answers[i] == base.answers[i] ? 1 : 0;
    }
  }
  out.score = mean_error(scores).mean;
  out.interval = wilson_interval(out.score, out.questions);
  out.nll = block_mean_error(losses, kLossBlock);
  if (timed > 0) out.seconds_per_step = seconds / static_cast<double>(timed);
  if (compared) {
    out.score_change = mean_error(changes);
    const double least = wilson_interval(0, out.questions).high;
    const double spread = changes.size() < 2 ? 0 : out.score_change->half_width();
    out.score_change_half_width = std::max(least, spread);
    out.nll_change = block_mean_error(loss_changes, kLossBlock);
    if (answers > 0) out.same_answers = static_cast<double>(same) / static_cast<double>(answers);
  }
  return out;
}

Json metrics_json(const SparsePolicy& policy, const DecodeTotals& totals) {
  Json out;
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

Json lab_report(const Lab& lab) {
  Json report = lab.header();
  Json results = Json::array();
  Json warnings = Json::array();
  for (std::size_t i = 0; i < lab.presets().size(); ++i) {
    const LabPreset& preset = lab.presets()[i];
    const PresetSummary s = summarise(lab, i);
    Json result;
    result["attention"] = preset.label;
    result.update(score_json(lab.task(), s));
    result["tokens"] = s.totals.steps;
    result.update(metrics_json(preset.policy, s.totals));
    result["telemetry"] = s.telemetry.report(preset.policy);
    for (const std::string& warning : s.telemetry.warnings(preset.policy)) {
      warnings.push_back(preset.label + ": " + warning);
    }
    if (lab.task().has_depth()) result["found_per_depth"] = found_per_depth(lab, i);
    result["grid"] = grid_json(lab, i);
    results.push_back(std::move(result));
  }
  if (results.size() == 1) {
    // Of the only result, at the top too.
    report.update(results.front());
  }
  report["results"] = std::move(results);
  report["warnings"] = std::move(warnings);
  return report;
}

std::string lab_table(const Lab& lab) {
  const Task& task = lab.task();
  Table table;
  std::vector<std::string> heading = {"attention"};
  if (task.has_score()) heading.insert(heading.end(), {"score", "found"});
  if (task.has_ppl()) heading.emplace_back("ppl");
  const bool compared = lab.baseline() < lab.presets().size() && lab.presets().size() > 1;
  if (compared) {
    if (task.has_score()) heading.emplace_back("score vs dense");
    if (task.has_ppl()) heading.emplace_back("ppl vs dense");
  }
  heading.insert(heading.end(), {"KV bytes", "in sparse layers", "kept", "union", "true mass"});
  table.add(heading);
  for (std::size_t i = 0; i < lab.presets().size(); ++i) {
    const PresetSummary s = summarise(lab, i);
    std::vector<std::string> row = {lab.presets()[i].label};
    if (task.has_score()) {
      row.push_back(with_error(fixed(s.score, 3), fixed(s.interval.half_width(), 3)));
      row.push_back(s.digits > 0 ? std::to_string(s.digits_right) + "/" + std::to_string(s.digits)
                                 : std::to_string(s.found) + "/" + std::to_string(s.trials));
    }
    if (task.has_ppl()) row.push_back(fixed(std::exp(s.nll.mean), 3));
    if (compared) {
      if (task.has_score()) {
        row.push_back(s.score_change ? with_error(fixed(s.score_change->mean, 3),
                                                  fixed(s.score_change_half_width, 3))
                                     : "");
      }
      if (task.has_ppl()) {
        row.push_back(s.nll_change ? with_error(signed_percent(std::expm1(s.nll_change->mean)),
                                                fixed(s.nll_change->half_width() * 100, 2))
                                   : "");
      }
    }
    const bool sparse = s.totals.sparse_layers > 0;
    row.push_back(fixed(s.totals.bytes_ratio(), 3));
    row.push_back(fixed(s.totals.sparse_bytes_ratio(), 3));
    row.push_back(sparse ? fixed(s.totals.kept_mean(), 0) : "");
    row.push_back(sparse ? fixed(s.totals.attended_mean(), 0) : "");
    row.push_back(s.totals.true_mass_counted > 0 ? fixed(s.totals.true_mass_mean(), 3) : "");
    table.add(row);
  }
  std::string out = table.text();
  const std::size_t lines = lab.contexts().size() * lab.depths().size() * lab.text_names().size();
  if (lines > 1) out += "\n" + grid_table(lab);
  return out;
}

std::string telemetry_lines(const Lab& lab) {
  std::string out;
  for (std::size_t i = 0; i < lab.presets().size(); ++i) {
    SparsePolicy named = lab.presets()[i].policy;
    named.name = lab.presets()[i].label;
    const std::string line = summarise(lab, i).telemetry.line(named);
    if (!line.empty()) out += line + "\n";
  }
  return out;
}

}  // namespace twilight::app
