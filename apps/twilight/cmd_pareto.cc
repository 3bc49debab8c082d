#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "commands.h"
#include "interrupt.h"
#include "lab.h"
#include "lab_report.h"
#include "markup.h"
#include "output.h"
#include "pareto_picture.h"
#include "real_range.h"
#include "table.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

// p of the published method, which its points in the picture carry.
constexpr double kPaperP[] = {0.85, 0.95};

struct ParetoFlags {
  LabFlags lab;
  PresetList presets{{"paper", "paper-full", "adaptive", "quest:1024", "quest:2048", "quest:4096"}};
  std::vector<double> ps = {0.7, 0.8, 0.85, 0.9, 0.95, 0.98};
  std::vector<double> fractions;
  std::string task = "ppl";
  std::int32_t context = 8192, last = 512, keys = 1;
};

struct Sweep {
  std::vector<LabPreset> presets;
  std::vector<std::string> series;  // [presets] name of the preset swept
};

bool ranks_pages(const SparsePolicy& policy) {
  return policy.selector != "full" && policy.selector != "streaming" &&
         policy.candidate_fraction > 0;
}

// Dense first, then each preset over p and candidate shares where it has them.
Sweep make_sweep(const ParetoFlags& flags) {
  Sweep out;
  AttentionFlags attention = flags.lab.attention;
  const auto add = [&](const std::string& name, const std::string& label) {
    LabPreset preset = lab_presets(attention, {name}).front();
    preset.label = label;
    for (const LabPreset& other : out.presets) {
      if (other.label == label) return;
    }
    out.presets.push_back(std::move(preset));
    out.series.push_back(name.substr(0, name.find(':')));  // one for all budgets of a preset
  };
  const auto add_over_fractions = [&](const std::string& name, const std::string& label,
                                      bool ranks) {
    attention.candidates = flags.lab.attention.candidates;
    if (!ranks || flags.fractions.empty()) {
      add(name, label);
      return;
    }
    for (const double fraction : flags.fractions) {
      attention.candidates = fraction;
      add(name, label + ", candidates " + digits3(fraction));
    }
    attention.candidates = flags.lab.attention.candidates;
  };
  add("dense", "dense");
  for (const std::string& name : flags.presets.names(flags.lab.attention)) {
    attention.p = flags.lab.attention.p;
    const SparsePolicy policy = attention.policy(name);
    if (policy.is_dense()) continue;
    if (!policy.prune || !policy.layer_p.empty()) {
      add_over_fractions(name, name, ranks_pages(policy));
      continue;
    }
    std::vector<double> ps = flags.ps;  // and the preset's own
    const bool listed = std::any_of(ps.begin(), ps.end(),
                                    [&](double p) { return static_cast<float>(p) == policy.p; });
    if (!listed) ps.push_back(static_cast<double>(policy.p));
    for (const double p : ps) {
      attention.p = p;
      add_over_fractions(name, name + " p " + digits3(p), ranks_pages(policy));
    }
  }
  return out;
}

std::unique_ptr<Task> make_task(const ParetoFlags& flags) {
  if (flags.task == "ppl") return make_ppl_task({flags.last});
  if (flags.task == "recall") return make_recall_task({});
  if (flags.task == "vt") return make_chain_task({});
  if (flags.task == "cwe" || flags.task == "fwe") {
    WordsOptions words;
    words.zipf = flags.task == "fwe";
    words.common = words.zipf ? 3 : 10;
    return make_words_task(words);
  }
  NeedleOptions needles;
  needles.name = flags.task;
  if (flags.task == "niah") needles.keys = flags.keys;
  return make_needle_task(needles);
}

// Whether a point is a preset as it comes, with no budget or p but its own.
bool is_own_point(const Sweep& sweep, std::size_t i) {
  const std::string& name = sweep.series[i];
  if (name == "quest" || name == "profile") return false;
  const SparsePolicy own = make_policy(name);
  const SparsePolicy& policy = sweep.presets[i].policy;
  return own.prune && own.p == policy.p && own.candidate_fraction == policy.candidate_fraction;
}

bool is_paper_point(const Sweep& sweep, std::size_t i) {
  if (!sweep.series[i].starts_with("paper")) return false;
  const double p = static_cast<double>(sweep.presets[i].policy.p);
  return std::any_of(std::begin(kPaperP), std::end(kPaperP),
                     [&](double each) { return std::abs(each - p) < 1e-6; });
}

ParetoData make_data(const Lab& lab, const Sweep& sweep, const ParetoFlags& flags) {
  const bool ppl = !lab.task().has_score();
  ParetoData data;
  data.title = ppl ? "Perplexity against bytes read" : flags.task + " score against bytes read";
  const std::filesystem::path model(lab.model().info().path);
  data.subtitle =
      (model.has_filename() ? model : model.parent_path()).filename().string() + ", " +
      grouped(flags.context) + " tokens" +
      (ppl ? ", last " + grouped(flags.last) + " through the decode path"
           : ", " + grouped(static_cast<std::int64_t>(lab.places().size())) + " items") +
      ", " + lab.device().description();
  data.bytes_axis = "KV and index bytes read in sparse layers, share of dense";
  data.loss_axis = ppl ? "perplexity over dense" : "score below dense";
  std::vector<Point> points;
  for (std::size_t i = 0; i < sweep.presets.size(); ++i) {
    const PresetSummary s = summarise(lab, i);
    const std::string value =
        ppl ? "ppl " + fixed(std::exp(s.nll.mean), 3) : "score " + fixed(s.score, 3);
    if (i == lab.baseline()) {
      data.dense = "dense: " + value;
      continue;
    }
    ParetoPoint point;
    point.label = sweep.presets[i].label;
    point.series = sweep.series[i];
    point.bytes = s.totals.sparse_bytes_ratio();
    point.loss = ppl ? std::expm1(s.nll_change->mean) : -s.score_change->mean;
    point.half_width = ppl ? s.nll_change->half_width() : s.score_change_half_width;
    point.value = value;
    if (is_paper_point(sweep, i)) {
      point.mark = point.series + " p " + digits3(static_cast<double>(sweep.presets[i].policy.p));
    } else if (is_own_point(sweep, i)) {
      point.mark = point.series;
    }
    points.push_back({point.bytes, point.loss});
    data.points.push_back(std::move(point));
  }
  for (const std::size_t i : pareto_front(points)) data.points[i].on_front = true;
  return data;
}

nlohmann::ordered_json data_json(const Lab& lab, const Sweep& sweep, const ParetoData& data) {
  nlohmann::ordered_json out = lab_report(lab);
  std::size_t next = 0;
  for (std::size_t i = 0; i < sweep.presets.size(); ++i) {
    nlohmann::ordered_json& result = out["results"][i];
    result["series"] = sweep.series[i];
    if (i == lab.baseline()) continue;
    const ParetoPoint& point = data.points[next++];
    result["loss"] = point.loss;
    result["loss_half_width"] = point.half_width;
    result["paper_point"] = is_paper_point(sweep, i);
    result["on_front"] = point.on_front;
  }
  return out;
}

std::string table_of(const ParetoData& data) {
  Table table;
  table.add({"attention", "bytes", "measured", "loss", "95 %", "front"});
  for (const ParetoPoint& point : data.points) {
    table.add({point.label, fixed(point.bytes * 100, 1) + " %", point.value,
               concat(point.loss > 0 ? "+" : "", fixed(point.loss * 100, 2), " %"),
               std::isfinite(point.half_width) ? "\u00b1 " + fixed(point.half_width * 100, 2)
                                               : "\u00b1 ?",
               point.on_front ? "*" : ""});
  }
  return table.text();
}

int run_pareto(ParetoFlags flags) {
  namespace fs = std::filesystem;
  const Sweep sweep = make_sweep(flags);
  const fs::path picture(flags.lab.out);
  const std::string extension = picture.extension().string();
  const bool svg = extension == ".svg";
  if (!svg && extension != ".html" && extension != ".htm") {
    throw Error(ErrorCode::kInvalidArgument, "[--out] kind of picture, got " + flags.lab.out +
                                                 ", accepted a name ending in .html or .svg");
  }
  OutputFile picture_file(flags.lab.out, flags.lab.force);
  OutputFile data_file(fs::path(picture).replace_extension(".json").string(), flags.lab.force);
  flags.lab.contexts = {flags.context};
  Lab lab(flags.lab, make_task(flags), sweep.presets);
  if (!lab.run()) {
    if (!flags.lab.resume.empty()) {
      std::fprintf(stderr, "twilight: interrupted; the same command goes on from %s\n",
                   flags.lab.resume.c_str());
    }
    return kInterruptedExit;
  }
  const ParetoData data = make_data(lab, sweep, flags);
  const std::string json = data_json(lab, sweep, data).dump(2);
  data_file.commit(json + "\n");
  picture_file.commit(svg ? "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n" +
                                draw_pareto(data, /*standalone=*/true)
                          : pareto_page(data));
  if (flags.lab.common.json) {
    std::printf("%s\n", json.c_str());
  } else {
    std::printf("%s", table_of(data).c_str());
    std::fflush(stdout);
    std::fprintf(stderr, "%s; picture in %s, data in %s\n", data.dense.c_str(),
                 picture_file.path().c_str(), data_file.path().c_str());
  }
  return 0;
}

}  // namespace

void add_pareto(CLI::App& app, Action& action) {
  auto flags = std::make_shared<ParetoFlags>();
  CLI::App* command = app.add_subcommand(
      "pareto", "Sweep presets and p; draw bytes read against perplexity or a task's score");
  command->footer(
      "The data is written beside the picture, with the ending .json. Presets are measured as "
      "they\n"
      "are; the profile that lies with a model is read where --profile names it.\n"
      "Example: twilight pareto --ctx 8192 --last 512 --out pareto.html");
  flags->lab.trials = 4;
  flags->lab.add_common(*command);
  flags->presets.add(*command, "Presets to sweep, dense besides");
  command->add_option("--ps", flags->ps, "p of the presets that prune, a list")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--fractions", flags->fractions,
                   "Candidate budgets of the presets that rank pages, a list like --candidates; "
                   "their own by default")
      ->delimiter(',');
  command->add_option("--task", flags->task, "What quality means")
      ->capture_default_str()
      ->check(CLI::IsMember({"ppl", "passkey", "niah", "vt", "cwe", "fwe", "recall"}));
  command->add_option("--ctx", flags->context, "Tokens of context")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 30));
  command->add_option("--last", flags->last, "Positions that ppl scores")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--keys", flags->keys, "Distinct keys of niah")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--depths", flags->lab.depths, "Depths of passkey and niah, a list")
      ->delimiter(',')
      ->capture_default_str()
      ->check(real_range(0.0, 1.0));
  command->add_option("--trials", flags->lab.trials, "Items of a task for each depth")
      ->capture_default_str()
      ->check(CLI::Range(1, 100000));
  command->add_option("--seed", flags->lab.seed, "Seed of what is drawn")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--out", flags->lab.out, "Picture to write: FILE.html or FILE.svg")
      ->required();
  command->callback([flags, &action] { action = [flags] { return run_pareto(*flags); }; });
}

}  // namespace twilight::app
