#include "load_stats.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "distribution.h"

namespace twilight::app {
namespace {

// Where the number of waiting or decoding requests changes.
struct Change {
  double at = 0;
  int waiting = 0, decoding = 0;
};

struct Window {
  double begin = 0, end = 0;
};

// Tokens that each event of a request stands for: one may bring several, and some bring none.
double tokens_per_event(const LoadResult& result) {
  if (result.completion_tokens == 0 || result.times.empty()) return 1;
  return static_cast<double>(result.completion_tokens) / static_cast<double>(result.times.size());
}

double seconds_per_token(const LoadResult& result) {
  return (result.times.back() - result.times.front()) / (result.completion_tokens - 1);
}

// How long requests waited for their first token, and how fast the others followed.
struct Paces {
  std::vector<double> first, per_token;

  void add(const LoadResult& result) {
    first.push_back(result.times.front() - result.due);
    if (result.completion_tokens > 1) per_token.push_back(seconds_per_token(result));
  }
};

std::vector<Change> changes_of(std::span<const LoadResult> results) {
  std::vector<Change> changes;
  for (const LoadResult& result : results) {
    const double first = result.times.empty() ? result.done : result.times.front();
    changes.push_back({result.sent, 1, 0});
    changes.push_back({first, -1, 0});
    if (!result.times.empty()) {
      changes.push_back({first, 0, 1});
      changes.push_back({result.times.back(), 0, -1});
    }
  }
  std::sort(changes.begin(), changes.end(),
            [](const Change& a, const Change& b) { return a.at < b.at; });
  return changes;
}

}  // namespace

Percentiles::Percentiles(std::vector<double> values) : count(values.size()) {
  if (values.empty()) return;
  std::sort(values.begin(), values.end());
  p50 = quantile(values, 0.5);
  p90 = quantile(values, 0.9);
  p99 = quantile(values, 0.99);
  max = values.back();
  mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

nlohmann::ordered_json Percentiles::json() const {
  nlohmann::ordered_json out;
  out["count"] = count;
  out["mean"] = mean;
  out["p50"] = p50;
  out["p90"] = p90;
  out["p99"] = p99;
  out["max"] = max;
  return out;
}

DecodeRate decode_rate(std::span<const LoadResult> results) {
  DecodeRate decode;
  std::vector<Window> windows;
  int waiting = 0;
  int decoding = 0;
  double last = 0;
  double stream_seconds = 0;
  for (const Change& change : changes_of(results)) {
    if (waiting == 0 && decoding > 0 && change.at > last) {
      if (windows.empty() || windows.back().end < last) windows.push_back({last, last});
      windows.back().end = change.at;
      decode.seconds += change.at - last;
      stream_seconds += decoding * (change.at - last);
    }
    waiting += change.waiting;
    decoding += change.decoding;
    last = change.at;
  }
  if (decode.seconds > 0) decode.streams = stream_seconds / decode.seconds;
  for (const LoadResult& result : results) {
    const double weight = tokens_per_event(result);
    // A token belongs to the time before it. The first one ends the reading of a prompt.
    for (std::size_t i = 1; i < result.times.size(); ++i) {
      const auto window =
          std::lower_bound(windows.begin(), windows.end(), result.times[i],
                           [](const Window& each, double at) { return each.end < at; });
      if (window != windows.end() && window->begin < result.times[i]) decode.tokens += weight;
    }
  }
  return decode;
}

std::vector<LoadClass> by_prompt(std::span<const LoadResult> results) {
  std::vector<LoadClass> classes;
  std::int32_t from = 0;
  for (const std::int32_t below : {1024, 4096, 16384, 0}) {
    LoadClass each;
    each.below = below;
    Paces paces;
    for (const LoadResult& result : results) {
      const std::int32_t tokens = result.request.prompt_tokens;
      if (!result.ok() || result.times.empty() || tokens < from || (below > 0 && tokens >= below)) {
        continue;
      }
      ++each.ok;
      paces.add(result);
    }
    each.first_token = Percentiles(std::move(paces.first));
    each.per_token = Percentiles(std::move(paces.per_token));
    classes.push_back(each);
    from = below;
  }
  return classes;
}

LoadSummary summarize(std::span<const LoadResult> results) {
  LoadSummary summary;
  Paces paces;
  std::vector<double> gaps, total, lag;
  std::vector<std::pair<double, int>> under_way;
  for (const LoadResult& result : results) {
    ++summary.requests;
    summary.seconds = std::max(summary.seconds, result.done);
    summary.cut += result.cut ? 1 : 0;
    summary.prompt_tokens += result.prompt_tokens;
    summary.cached_tokens += result.cached_tokens;
    summary.completion_tokens += result.completion_tokens > 0
                                     ? result.completion_tokens
                                     : static_cast<std::int64_t>(result.times.size());
    under_way.emplace_back(result.sent, 1);
    under_way.emplace_back(result.done, -1);
    lag.push_back(result.sent - result.due);
    if (!result.error.empty() && !result.cut) ++summary.errors[result.error];
    if (!result.ok()) continue;
    ++summary.ok;
    total.push_back(result.done - result.due);
    if (result.times.empty()) continue;
    paces.add(result);
    for (std::size_t i = 1; i < result.times.size(); ++i) {
      gaps.push_back(result.times[i] - result.times[i - 1]);
    }
  }
  std::sort(under_way.begin(), under_way.end());  // ends before starts at one moment
  double now = 0;
  for (const auto& [at, change] : under_way) {
    now += change;
    summary.peak_streams = std::max(summary.peak_streams, now);
  }
  summary.decode = decode_rate(results);
  summary.first_token = Percentiles(std::move(paces.first));
  summary.per_token = Percentiles(std::move(paces.per_token));
  summary.gap = Percentiles(std::move(gaps));
  summary.total = Percentiles(std::move(total));
  summary.lag = Percentiles(std::move(lag));
  return summary;
}

nlohmann::ordered_json LoadSummary::json() const {
  nlohmann::ordered_json out;
  out["requests"] = requests;
  out["ok"] = ok;
  out["cut"] = cut;
  out["errors"] = errors;
  out["seconds"] = seconds;
  out["prompt_tokens"] = prompt_tokens;
  out["cached_prompt_tokens"] = cached_tokens;
  out["completion_tokens"] = completion_tokens;
  out["peak_streams"] = peak_streams;
  out["requests_per_second"] = requests_per_second();
  out["output_tokens_per_second"] = output_rate();
  out["tokens_per_second"] = token_rate();
  out["decode_only"] = {{"seconds", decode.seconds},
                        {"tokens", decode.tokens},
                        {"streams_mean", decode.streams},
                        {"tokens_per_second", decode.rate()}};
  out["first_token_seconds"] = first_token.json();
  out["per_token_seconds"] = per_token.json();
  out["gap_seconds"] = gap.json();
  out["total_seconds"] = total.json();
  out["lag_seconds"] = lag.json();
  return out;
}

}  // namespace twilight::app
