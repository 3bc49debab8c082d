#include <algorithm>
#include <cstdio>
#include <utility>

#include "bench_serve.h"
#include "distribution.h"
#include "table.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

struct Row {
  const ServeRun* run;
  LoadSummary all;
};

std::vector<Row> rows_of(const ServeReport& report) {
  std::vector<Row> rows;
  for (const ServeRun& run : report.runs) {
    if (!run.rounds.empty()) rows.push_back({&run, summarize(run.results)});
  }
  return rows;
}

// Dense attention, where it was run and is not alone.
const Row* dense_of(const std::vector<Row>& rows) {
  const auto found = std::find_if(rows.begin(), rows.end(),
                                  [](const Row& row) { return row.run->name == "dense"; });
  return found == rows.end() || rows.size() < 2 ? nullptr : &*found;
}

double ratio(double a, double b) { return b > 0 ? a / b : 0; }

Distribution over_rounds(const ServeRun& run, double (*value)(const LoadSummary&)) {
  std::vector<double> values;
  for (const LoadSummary& round : run.rounds) values.push_back(value(round));
  return Distribution(values);
}

double output_rate(const LoadSummary& s) { return s.output_rate(); }
double decode_rate_of(const LoadSummary& s) { return s.decode.rate(); }

struct CountSums {
  double read = 0, dense = 0, preemptions = 0;
  std::int64_t lost = 0;
  bool known = false, checked = true;
};

CountSums sum_counts(const ServeRun& run) {
  CountSums sums;
  for (const ServerCounts& counts : run.counts) {
    sums.read += counts.kv_bytes_read;
    sums.dense += counts.kv_bytes_dense;
    sums.preemptions += counts.preemptions;
    sums.lost += counts.pages_lost();
    sums.known = sums.known || counts.known;
    sums.checked = sums.checked && counts.known && counts.idle;
  }
  return sums;
}

Json classes_json(const std::vector<LoadResult>& results) {
  Json list = Json::array();
  for (const LoadClass& each : by_prompt(results)) {
    if (each.ok == 0) continue;
    Json out;
    out["prompt_tokens_below"] = each.below > 0 ? Json(each.below) : Json(nullptr);
    out["ok"] = each.ok;
    out["first_token_seconds"] = each.first_token.json();
    out["per_token_seconds"] = each.per_token.json();
    list.push_back(std::move(out));
  }
  return list;
}

Json row_json(const Row& row, const Row* dense) {
  const ServeRun& run = *row.run;
  Json out;
  out["attention"] = run.name;
  if (!run.policy.is_null()) out["policy"] = run.policy;
  const Json summary = row.all.json();
  for (const auto& [key, value] : summary.items()) out[key] = value;
  out["by_prompt_length"] = classes_json(run.results);
  out["rounds"] = {{"output_tokens_per_second", over_rounds(run, output_rate).json()},
                   {"decode_only_tokens_per_second", over_rounds(run, decode_rate_of).json()}};
  const CountSums sums = sum_counts(run);
  if (sums.known) {
    out["kv_bytes_ratio"] = ratio(sums.read, sums.dense);
    out["preemptions"] = sums.preemptions;
    out["pages_checked"] = sums.checked;
    out["pages_lost"] = sums.lost;
  }
  if (dense != nullptr) {
    out["output_rate_of_dense"] = ratio(row.all.output_rate(), dense->all.output_rate());
    out["decode_rate_of_dense"] = ratio(row.all.decode.rate(), dense->all.decode.rate());
  }
  return out;
}

std::string arrivals_text(const ServeBenchFlags& flags) {
  return flags.limits.streams > 0 ? std::to_string(flags.limits.streams) + " streams"
                                  : digits3(flags.rate) + " requests/s, arriving at random";
}

std::string limits_text(const LoadLimits& limits) {
  std::string text;
  if (limits.requests > 0) text = std::to_string(limits.requests) + " requests";
  if (limits.duration > 0) {
    text += (text.empty() ? "" : ", ") + digits3(limits.duration) + " s";
  }
  return text;
}

std::string times_text(double value) { return value > 0 ? fixed(value, 2) + "x" : "-"; }

void add_latency(Table& table, const std::string& name, const std::string& what,
                 const Percentiles& p) {
  const auto ms = [](double seconds) { return digits3(seconds * 1e3); };
  if (p.count == 0) return;
  table.add({name, what, ms(p.mean), ms(p.p50), ms(p.p90), ms(p.p99), ms(p.max)});
}

}  // namespace

Json serve_report_json(const ServeBenchFlags& flags, const ServeReport& report) {
  Json out;
  out["benchmark"] = "serve";
  if (!report.device.empty()) out["device"] = report.device;
  out["model"] = report.model;
  flags.bench.attention.report(out);
  out["server"] = report.server;
  out["streams"] = flags.limits.streams > 0 ? Json(flags.limits.streams) : Json(nullptr);
  out["rate"] = flags.rate > 0 ? Json(flags.rate) : Json(nullptr);
  out["requests"] = flags.limits.requests > 0 ? Json(flags.limits.requests) : Json(nullptr);
  out["duration"] = flags.limits.duration > 0 ? Json(flags.limits.duration) : Json(nullptr);
  out["prompt_tokens"] = flags.prompt_tokens;
  out["output_tokens"] = flags.output_tokens;
  out["documents"] = flags.documents;
  out["seed"] = flags.seed;
  out["rounds"] = flags.rounds;
  out["context"] = report.context;
  if (flags.url.empty()) {
    const server::SchedulerOptions options = flags.own.scheduler_options();
    out["max_seqs"] = options.engine.max_seqs;
    out["cache_tokens"] = options.engine.cache_tokens;
    out["prefill_tokens"] = options.prefill_tokens_per_step;
    out["prefix_cache"] = options.prefix_cache;
  }
  out["load_average"] = {report.load_before, report.load_after};
  out["interrupted"] = report.interrupted;
  out["results"] = Json::array();
  const std::vector<Row> rows = rows_of(report);
  const Row* dense = dense_of(rows);
  for (const Row& row : rows) out["results"].push_back(row_json(row, dense));
  return out;
}

void print_serve_report(const ServeBenchFlags& flags, const ServeReport& report) {
  std::printf("Load on %s, %s%s\n", report.model.c_str(), report.server.c_str(),
              report.device.empty() ? "" : (", " + report.device).c_str());
  std::printf("%s, %s; prompts of %s tokens, outputs of %s, seed %llu\n",
              arrivals_text(flags).c_str(), limits_text(flags.limits).c_str(),
              flags.prompt_tokens.c_str(), flags.output_tokens.c_str(),
              static_cast<unsigned long long>(flags.seed));
  std::printf("Load average: %.1f before, %.1f after%s\n\n", report.load_before, report.load_after,
              report.interrupted ? "; interrupted" : "");
  const std::vector<Row> rows = rows_of(report);
  const Row* dense = dense_of(rows);
  Table rates, waits;
  rates.add({"", "ok", "failed", "cut", "seconds", "requests/s", "output tok/s", "of dense",
             "decode tok/s", "of dense", "streams", "KV bytes"});
  waits.add({"", "ms", "mean", "p50", "p90", "p99", "max"});
  for (const Row& row : rows) {
    const LoadSummary& all = row.all;
    const CountSums sums = sum_counts(*row.run);
    const double output = dense == nullptr ? 0 : ratio(all.output_rate(), dense->all.output_rate());
    const double decode = dense == nullptr ? 0 : ratio(all.decode.rate(), dense->all.decode.rate());
    rates.add({row.run->name, std::to_string(all.ok),
               std::to_string(all.requests - all.ok - all.cut), std::to_string(all.cut),
               digits3(all.seconds), digits3(all.requests_per_second()), digits3(all.output_rate()),
               times_text(output), all.decode.seconds > 0 ? digits3(all.decode.rate()) : "-",
               times_text(decode), digits3(all.decode.streams),
               sums.dense > 0 ? fixed(100 * ratio(sums.read, sums.dense), 1) + " %" : "-"});
    add_latency(waits, row.run->name, "first token", all.first_token);
    add_latency(waits, "", "per token", all.per_token);
    add_latency(waits, "", "gap", all.gap);
    add_latency(waits, "", "whole", all.total);
  }
  std::printf("%s\n%s\n", rates.text().c_str(), waits.text().c_str());
  std::printf("decode: while nobody waits for a first token; streams: their mean number then.\n");
  for (const Row& row : rows) {
    for (const auto& [kind, count] : row.all.errors) {
      std::printf("%s: %lld failed, %s\n", row.run->name.c_str(), static_cast<long long>(count),
                  kind.c_str());
    }
    const CountSums sums = sum_counts(*row.run);
    if (sums.lost != 0) {
      std::printf("%s: %lld pages lost\n", row.run->name.c_str(),
                  static_cast<long long>(sums.lost));
    } else {
      std::printf("%s: %s; %.0f preemptions; %lld of %lld prompt tokens from the prefix cache\n",
                  row.run->name.c_str(),
                  sums.checked ? "every page given back" : "pages not checked", sums.preemptions,
                  static_cast<long long>(row.all.cached_tokens),
                  static_cast<long long>(row.all.prompt_tokens));
    }
  }
}

}  // namespace twilight::app
