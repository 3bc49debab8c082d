#include "bench_op_report.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "bench_common.h"
#include "distribution.h"
#include "stats_json.h"
#include "table.h"

namespace twilight::app {

void OpResult::add(const LayerStats& stats) {
  const auto append = [](std::vector<double>& to, const auto& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  paths.emplace(step_path_name(stats.path));
  totals.add(stats);
  append(candidates, stats.candidates);
  append(unions, stats.attended);
  append(kept, stats.kept);
  append(estimated_mass, stats.estimated_mass);
  append(true_mass, stats.true_mass);
}

void OpResult::compare(std::span<const float> dense, std::span<const float> out,
                       std::int32_t head_dim) {
  const auto dim = static_cast<std::size_t>(head_dim);
  for (std::size_t head = 0; head < out.size(); head += dim) {
    double dot = 0, dense_square = 0, square = 0;
    for (std::size_t i = head; i < head + dim; ++i) {
      const auto a = static_cast<double>(dense[i]);
      const auto b = static_cast<double>(out[i]);
      dot += a * b;
      dense_square += a * a;
      square += b * b;
      difference_sum += std::abs(a - b);
      // Not std::max: a NaN has to show.
      if (!(std::abs(a - b) <= max_difference)) max_difference = std::abs(a - b);
    }
    cosines.push_back(dot / std::sqrt(dense_square * square));
  }
  difference_count += out.size();
}

nlohmann::ordered_json OpReport::result_json(const OpResult& result) const {
  const OpResult& dense = *results.front();
  const Distribution time(result.seconds);
  const double bytes = static_cast<double>(result.totals.bytes_read) / copies;
  const double peak = *std::max_element(bandwidth.begin(), bandwidth.end());
  std::vector<double> microseconds, paired;
  for (std::size_t i = 0; i < result.seconds.size(); ++i) {
    microseconds.push_back(result.seconds[i] * 1e6);
    paired.push_back(dense.seconds[i] / result.seconds[i]);
  }
  nlohmann::ordered_json out;
  out["policy"] = policy_json(result.policy);
  out["ran"] = result.paths;
  out["us_per_step"] = Distribution(microseconds).json();
  out["us_samples"] = microseconds;
  out["bytes_per_step"] = bytes;
  out["bytes_ratio"] = result.totals.bytes_ratio();
  out["gb_per_second"] = bytes / time.median * 1e-9;
  out["bandwidth_share"] = bytes / time.median * 1e-9 / peak;
  out["us_bound"] = bytes / peak * 1e-3;
  out["speedup"] = Distribution(dense.seconds).median / time.median;
  out["speedup_of_minima"] = Distribution(dense.seconds).min / time.min;
  out["speedup_paired"] = Distribution(paired).json();
  out["candidates"] = Distribution(result.candidates).json();
  out["kept"] = Distribution(result.kept).json();
  out["union"] = Distribution(result.unions).json();
  out["estimated_mass"] = Distribution(result.estimated_mass).json();
  out["true_mass"] = Distribution(result.true_mass).json();
  nlohmann::ordered_json difference;
  difference["max_abs"] = result.max_difference;
  difference["mean_abs"] = result.difference_sum /
                           static_cast<double>(std::max<std::size_t>(result.difference_count, 1));
  difference["cosine"] = Distribution(result.cosines).json();
  out["against_dense"] = difference;
  return out;
}

nlohmann::ordered_json OpReport::json() const {
  const auto microseconds = [](std::vector<double> seconds) {
    for (double& value : seconds) value *= 1e6;
    return Distribution(std::move(seconds)).json();
  };
  nlohmann::ordered_json out;
  out["benchmark"] = "op";
  out["device"] = device;
  out["batch"] = batch;
  out["context"] = context;
  out["num_q_heads"] = shape.num_q_heads;
  out["num_kv_heads"] = shape.num_kv_heads;
  out["head_dim"] = shape.head_dim;
  out["page_size"] = page_size;
  out["dtype"] = dtype;
  out["data"] = data_json;
  out["copies"] = copies;
  out["state_bytes"] = state_bytes;
  out["kv_bytes"] = kv_bytes;
  out["last_level_cache_bytes"] = cache_bytes;
  out["cache_walk_bytes"] = walk_bytes;
  out["repeats"] = repeats;
  out["read_bandwidth_gb_per_second"] = bandwidth;
  out["load_average"] = load;
  out["begin_us"] = microseconds(begin_seconds);
  out["append_us"] = microseconds(append_seconds);
  out["results"] = nlohmann::ordered_json::array();
  for (const OpResult* result : results) out["results"].push_back(result_json(*result));
  return out;
}

std::string OpReport::text() const {
  const auto count = [](std::int64_t value) { return std::to_string(value); };
  const auto bytes = [](std::int64_t value) { return bytes_text(static_cast<double>(value)); };
  std::string out = "One layer, one decode step on " + device + ": B " + count(batch) + ", N " +
                    count(context) + ", " + count(shape.num_q_heads) + " query and " +
                    count(shape.num_kv_heads) + " KV heads, D " + count(shape.head_dim) + ", P " +
                    count(page_size) + ", " + dtype + "\nData: " + data +
                    "\nMemory: " + bytes(state_bytes) +
                    " of keys, values and index, all distinct, " +
                    (copies == 1 ? "1 batch" : count(copies) + " batches in turn") + "; " +
                    bytes(walk_bytes) + " walked before every step (cache " + bytes(cache_bytes) +
                    ")\nRead bandwidth: " + fixed(bandwidth.front(), 1) + " GB/s before, " +
                    fixed(bandwidth.back(), 1) + " GB/s after; load average " +
                    fixed(load.front(), 1) + ", " + fixed(load.back(), 1) + "\n\n";
  Table times, sets;
  times.add({"", "us/step", "min", "max", "MB read", "of dense", "GB/s", "of peak", "speed-up",
             "of minima"});
  // Of a set of sizes that are all the same, the first column says everything.
  const auto spread = [](const Distribution& sizes) {
    return sizes.min == sizes.max ? std::string("-") : sizes.text(0);
  };
  sets.add({"", "candidates", "kept", "min / p10 / median / p90 / max", "union", "est. mass",
            "true mass", "max diff", "mean diff", "cosine", "ran"});
  for (const OpResult* entry : results) {
    const OpResult& result = *entry;
    const nlohmann::ordered_json r = result_json(result);
    const auto number = [&r](const char* key) { return r[key].get<double>(); };
    const auto& us = r["us_per_step"];
    times.add({result.policy.name, fixed(us["median"].get<double>(), 0),
               fixed(us["min"].get<double>(), 0), fixed(us["max"].get<double>(), 0),
               digits3(number("bytes_per_step") * 1e-6),
               fixed(100 * number("bytes_ratio"), 1) + " %", fixed(number("gb_per_second"), 1),
               fixed(100 * number("bandwidth_share"), 0) + " %", fixed(number("speedup"), 2) + "x",
               fixed(number("speedup_of_minima"), 2) + "x"});
    std::string ran;
    for (const std::string& path : result.paths) ran += (ran.empty() ? "" : ", ") + path;
    if (result.policy.is_dense()) ran = "dense";
    const auto& difference = r["against_dense"];
    sets.add({result.policy.name, fixed(r["candidates"]["mean"].get<double>(), 0),
              fixed(r["kept"]["mean"].get<double>(), 0), spread(Distribution(result.kept)),
              fixed(r["union"]["mean"].get<double>(), 0),
              fixed(r["estimated_mass"]["mean"].get<double>(), 3),
              fixed(r["true_mass"]["mean"].get<double>(), 3),
              digits3(difference["max_abs"].get<double>()),
              digits3(difference["mean_abs"].get<double>()),
              fixed(difference["cosine"]["mean"].get<double>(), 4), ran});
  }
  out += times.text() + "\n" + sets.text() + "\nMedians of " + count(repeats) +
         " interleaved rounds. Outside the step, once for all layers: page tables " +
         fixed(Distribution(begin_seconds).median * 1e6, 0) +
         " us; once a layer: writing the token and indexing a page it fills " +
         fixed(Distribution(append_seconds).median * 1e6, 0) + " us.\n";
  return out;
}

}  // namespace twilight::app
