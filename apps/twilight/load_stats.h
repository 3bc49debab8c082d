#ifndef TWILIGHT_APPS_LOAD_STATS_H_
#define TWILIGHT_APPS_LOAD_STATS_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "load_plan.h"

namespace twilight::app {

/// What a client saw of one request. Times in seconds after the run's start.
struct LoadResult {
  LoadRequest request;
  double due = 0;  ///< when it was to be sent; waits count from here
  double sent = 0, done = 0;
  std::vector<double> times;  ///< when each event with text came
  std::int32_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;  ///< as usage has it
  std::string error;  ///< its kind; empty where there is none
  bool cut = false;   ///< ended from this side, before its end

  [[nodiscard]] bool ok() const { return error.empty() && !cut; }
};

/// All zero where nothing was measured.
struct Percentiles {
  std::size_t count = 0;
  double mean = 0, p50 = 0, p90 = 0, p99 = 0, max = 0;

  Percentiles() = default;
  explicit Percentiles(std::vector<double> values);
  [[nodiscard]] nlohmann::ordered_json json() const;
};

/// Tokens a second while nobody waits for a first token, so that no prompt is being read.
struct DecodeRate {
  double seconds = 0;  ///< of such times
  double tokens = 0;
  double streams = 0;  ///< mean number of streams then
  [[nodiscard]] double rate() const { return seconds > 0 ? tokens / seconds : 0; }
};
[[nodiscard]] DecodeRate decode_rate(std::span<const LoadResult> results);

struct LoadSummary {
  std::int64_t requests = 0, ok = 0, cut = 0;
  std::map<std::string, std::int64_t> errors;  ///< by kind
  double seconds = 0;                          ///< from the start to the last end
  std::int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  DecodeRate decode;
  double peak_streams = 0;  ///< most requests under way at once
  /// Seconds: to the first token from when the request was due; between the tokens of a request on
  /// average (requests of two tokens or more); between two events; to the end; and how late the
  /// generator was.
  Percentiles first_token, per_token, gap, total, lag;

  [[nodiscard]] double requests_per_second() const { return rate(static_cast<double>(ok)); }
  [[nodiscard]] double output_rate() const { return rate(static_cast<double>(completion_tokens)); }
  [[nodiscard]] double token_rate() const {
    return rate(static_cast<double>(completion_tokens + prompt_tokens));
  }
  [[nodiscard]] nlohmann::ordered_json json() const;

 private:
  [[nodiscard]] double rate(double count) const { return seconds > 0 ? count / seconds : 0; }
};

/// Requests that ended well, by length of the prompts: those below a number of tokens and not in an
/// earlier class.
struct LoadClass {
  std::int32_t below = 0;  ///< 0: the rest
  std::int64_t ok = 0;
  Percentiles first_token, per_token;
};
[[nodiscard]] std::vector<LoadClass> by_prompt(std::span<const LoadResult> results);

/// Of one run. Latencies are of requests that ended well.
[[nodiscard]] LoadSummary summarize(std::span<const LoadResult> results);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LOAD_STATS_H_
