#include "bench_op.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "distribution.h"
#include "interrupt.h"
#include "output.h"
#include "paths.h"
#include "progress.h"
#include "stats_json.h"
#include "table.h"
#include "twilight/attention.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

// Before every timed step this many times the last-level cache is read elsewhere, and the data is
// at least as large.
constexpr std::int64_t kCacheMultiple = 4;
constexpr std::int32_t kFillTokens = 512;  // written at once
constexpr double kMemoryShare = 0.9;       // of what is available, that the data may take

/// A batch of sequences that hold all but the last token, and what the last step brings.
struct Copy {
  std::vector<Sequence> sequences;
  std::vector<Sequence*> batch;
  std::vector<float> k, v, q;    // [B, Hkv, D], [B, Hkv, D], [B, Hq, D]
  std::vector<float> dense_out;  // [B, Hq, D]
};

/// One policy: what it read and kept, and how long it took.
struct Variant {
  SparsePolicy policy;
  std::unique_ptr<Attention> attention;
  std::set<std::string> paths;
  DecodeTotals totals;  // of one step on every copy, with the true mass
  std::vector<double> candidates, unions, kept, estimated_mass, true_mass;
  double max_difference = 0, difference_sum = 0;
  std::size_t difference_count = 0;
  std::vector<double> cosines;
  std::vector<double> seconds;
};

class OpBench {
 public:
  OpBench(const OpFlags& flags, const Device& device) : flags_(flags), device_(device) {
    cache_bytes_ = last_level_cache_bytes();
  }

  /// False where the user stopped it.
  bool run() {
    settle();
    make_cache();
    if (!make_workload() || !fill() || !check_outputs()) return false;
    walk_ = std::make_unique<CacheWalk>(kCacheMultiple * cache_bytes_, device_.threads());
    const std::int64_t probe = std::max(walk_->bytes(), std::int64_t{256} << 20);
    load_before_ = load_average();
    bandwidth_.push_back(measure_read_bandwidth(device_, probe));
    if (!time_steps()) return false;
    bandwidth_.push_back(measure_read_bandwidth(device_, probe));
    load_after_ = load_average();
    return true;
  }

  [[nodiscard]] nlohmann::ordered_json json() const;
  void print() const;

 private:
  void settle();
  void make_cache();
  bool make_workload();
  bool fill();
  bool check_outputs();
  bool time_steps();
  void compare(const Copy& copy, const std::vector<float>& out, Variant& variant) const;
  [[nodiscard]] nlohmann::ordered_json variant_json(const Variant& variant) const;
  [[nodiscard]] double peak() const {
    return *std::max_element(bandwidth_.begin(), bandwidth_.end());
  }
  [[nodiscard]] std::int64_t data_bytes() const {
    return std::int64_t{flags_.batch} * flags_.context * shape_.num_kv_heads * shape_.head_dim * 2 *
           dtype_bytes(parse_dtype(flags_.dtype));
  }
  [[nodiscard]] double bytes_per_step(const Variant& variant) const {
    return static_cast<double>(variant.totals.bytes_read) / static_cast<double>(copies_.size());
  }

  const OpFlags& flags_;
  Device device_;
  LayerShape shape_;
  std::int64_t cache_bytes_;
  std::int32_t num_copies_ = 1;
  std::int64_t state_bytes_ = 0;
  std::optional<Model> model_;
  std::unique_ptr<Workload> workload_;
  std::unique_ptr<KvCache> cache_;
  std::vector<Copy> copies_;
  std::vector<Variant> variants_;
  std::unique_ptr<CacheWalk> walk_;
  std::vector<double> begin_seconds_, append_seconds_;
  std::vector<double> bandwidth_;
  double load_before_ = 0, load_after_ = 0;
};

void OpBench::settle() {
  for (SparsePolicy& policy : bench_policies(flags_.bench.attention)) {
    policy.dense_layers = 0;
    policy.dense_below_tokens = 0;
    variants_.emplace_back().policy = std::move(policy);
  }
  shape_ = flags_.shape;
  if (!flags_.model.empty()) {
    model_ = load_model(flags_.model, flags_.bench.common);
    shape_ = {model_->info().num_q_heads, model_->info().num_kv_heads, model_->info().head_dim};
  }
  num_copies_ = static_cast<std::int32_t>(
      std::clamp<std::int64_t>((kCacheMultiple * cache_bytes_ - 1) / data_bytes() + 1, 1, 64));
}

bool OpBench::make_workload() {
  if (model_) {
    CaptureOptions options;
    options.text_file = flags_.text.empty() ? bundled_novel() : flags_.text;
    options.num_tokens = flags_.context;
    options.num_seqs = flags_.batch * num_copies_;
    options.layer = flags_.layer;
    workload_ = capture_workload(device_, *model_, options, !flags_.bench.common.json);
    return workload_ != nullptr;
  }
  PlantedOptions options;
  options.shape = shape_;
  options.num_tokens = flags_.context;
  options.budget = flags_.budget;
  options.seed = flags_.seed;
  workload_ = make_planted(options);
  return true;
}

void OpBench::make_cache() {
  KvCacheOptions options;
  options.num_layers = 1;
  options.num_kv_heads = shape_.num_kv_heads;
  options.head_dim = shape_.head_dim;
  options.page_size = flags_.bench.attention.page_size;
  options.dtype = parse_dtype(flags_.dtype);
  const auto with_index = [&](std::int64_t pages) {
    options.num_pages = static_cast<std::int32_t>(pages);
    auto cache = std::make_unique<KvCache>(device_, options, variants_.front().policy);
    for (const Variant& variant : variants_) cache->set_index(variant.policy);
    return cache;
  };
  const std::int64_t bytes_per_page = with_index(1)->bytes_per_page();
  const std::int64_t pages = (std::int64_t{flags_.context} + options.page_size - 1) /
                             options.page_size * flags_.batch * num_copies_;
  state_bytes_ = pages * bytes_per_page;
  const double room = kMemoryShare * static_cast<double>(available_memory_bytes());
  if (static_cast<double>(state_bytes_) > room || pages > (1 << 30)) {
    throw Error(ErrorCode::kOutOfMemory,
                "[bench] keys, values and index of " + std::to_string(num_copies_ * flags_.batch) +
                    " sequences of " + std::to_string(flags_.context) + " tokens, got " +
                    bytes_text(static_cast<double>(state_bytes_)) + ", accepted up to " +
                    bytes_text(room) + " of the memory available now; lower --batch or --ctx");
  }
  cache_ = with_index(pages);
  for (Variant& variant : variants_) {
    variant.attention = std::make_unique<Attention>(
        *cache_, variant.policy, AttentionLimits{shape_.num_q_heads, flags_.batch, flags_.context});
  }
}

bool OpBench::fill() {
  const std::size_t row = static_cast<std::size_t>(shape_.num_kv_heads * shape_.head_dim);
  Attention writer(*cache_, variants_.front().policy,
                   AttentionLimits{shape_.num_q_heads, 1, flags_.context});
  std::vector<float> k(kFillTokens * row), v(k.size());
  ProgressBar bar("Making keys and values", "tokens", !flags_.bench.common.json);
  const std::int64_t total = std::int64_t{num_copies_} * flags_.batch * flags_.context;
  std::int64_t done = 0;
  for (std::int32_t c = 0; c < num_copies_; ++c) {
    Copy& copy = copies_.emplace_back();
    copy.k.resize(static_cast<std::size_t>(flags_.batch) * row);
    copy.v.resize(copy.k.size());
    for (std::int32_t b = 0; b < flags_.batch; ++b) {
      const std::int32_t seq = c * flags_.batch + b;
      workload_->prepare(seq);
      copy.sequences.push_back(cache_->new_sequence());
      Sequence* const batch[] = {&copy.sequences.back()};
      const std::int32_t last = workload_->num_tokens(seq) - 1;
      for (std::int32_t first = 0; first < last; first += kFillTokens) {
        if (interrupted()) return false;
        const std::int32_t count = std::min(kFillTokens, last - first);
        workload_->tokens(first, count, k.data(), v.data());
        if (!writer.begin(batch, count)) {
          throw Error(ErrorCode::kInternal, "[bench] the cache made for the data ran out of pages");
        }
        writer.append(0, k.data(), v.data());
        done += count;
        bar.update(done, total);
      }
      const std::size_t at = static_cast<std::size_t>(b) * row;
      workload_->tokens(last, 1, copy.k.data() + at, copy.v.data() + at);
      const std::span<const float> q = workload_->query();
      copy.q.insert(copy.q.end(), q.begin(), q.end());
    }
  }
  for (Copy& copy : copies_) {
    for (Sequence& sequence : copy.sequences) copy.batch.push_back(&sequence);
  }
  return true;
}

void OpBench::compare(const Copy& copy, const std::vector<float>& out, Variant& variant) const {
  const auto dim = static_cast<std::size_t>(shape_.head_dim);
  for (std::size_t head = 0; head < out.size(); head += dim) {
    double dot = 0, dense_square = 0, square = 0;
    for (std::size_t i = head; i < head + dim; ++i) {
      const auto a = static_cast<double>(copy.dense_out[i]);
      const auto b = static_cast<double>(out[i]);
      dot += a * b;
      dense_square += a * a;
      square += b * b;
      variant.difference_sum += std::abs(a - b);
      // Not std::max: a NaN has to show.
      if (!(std::abs(a - b) <= variant.max_difference)) variant.max_difference = std::abs(a - b);
    }
    variant.cosines.push_back(dot / std::sqrt(dense_square * square));
  }
  variant.difference_count += out.size();
}

bool OpBench::check_outputs() {
  std::vector<float> out;
  ProgressBar bar("Checking outputs", "", !flags_.bench.common.json);
  std::int64_t done = 0;
  for (Variant& variant : variants_) {
    Attention& attention = *variant.attention;
    attention.collect_stats(true, true);
    for (Copy& copy : copies_) {
      if (interrupted()) return false;
      bar.update(done++, static_cast<std::int64_t>(variants_.size() * copies_.size()));
      out.assign(copy.q.size(), 0.0F);
      if (!attention.begin(copy.batch, 1)) {
        throw Error(ErrorCode::kInternal, "[bench] the cache made for the data ran out of pages");
      }
      attention.append(0, copy.k.data(), copy.v.data());
      attention.decode(0, copy.q.data(), out.data());
      for (const LayerStats& stats : attention.stats(0)) {
        variant.paths.emplace(step_path_name(stats.path));
        variant.totals.add(stats);
        const auto add = [](std::vector<double>& to, const auto& from) {
          to.insert(to.end(), from.begin(), from.end());
        };
        add(variant.candidates, stats.candidates);
        add(variant.unions, stats.attended);
        add(variant.kept, stats.kept);
        add(variant.estimated_mass, stats.estimated_mass);
        add(variant.true_mass, stats.true_mass);
      }
      attention.rollback();
      if (&variant == &variants_.front()) copy.dense_out = out;
      compare(copy, out, variant);
    }
    attention.collect_stats(false);
  }
  return true;
}

bool OpBench::time_steps() {
  std::vector<float> out(copies_.front().q.size());
  ProgressBar bar("Timing", "rounds", !flags_.bench.common.json);
  for (std::int32_t round = -1; round < flags_.repeats; ++round) {  // round -1 warms up
    bar.update(round + 1, flags_.repeats + 1);
    for (std::size_t i = 0; i < variants_.size(); ++i) {
      if (interrupted()) return false;
      Variant& variant = variants_[i];
      Copy& copy = copies_[(static_cast<std::size_t>(round + 1) + i) % copies_.size()];
      walk_->run();
      const Stopwatch begin;
      if (!variant.attention->begin(copy.batch, 1)) {
        throw Error(ErrorCode::kInternal, "[bench] the cache made for the data ran out of pages");
      }
      const double begin_seconds = begin.seconds();
      const Stopwatch append;
      variant.attention->append(0, copy.k.data(), copy.v.data());
      const double append_seconds = append.seconds();
      const Stopwatch decode;
      variant.attention->decode(0, copy.q.data(), out.data());
      const double seconds = decode.seconds();
      variant.attention->rollback();
      if (round < 0) continue;
      variant.seconds.push_back(seconds);
      begin_seconds_.push_back(begin_seconds);
      append_seconds_.push_back(append_seconds);
    }
  }
  return true;
}

nlohmann::ordered_json OpBench::variant_json(const Variant& variant) const {
  const Variant& dense = variants_.front();
  const Distribution time(variant.seconds);
  const double bytes = bytes_per_step(variant);
  std::vector<double> microseconds, paired;
  for (std::size_t i = 0; i < variant.seconds.size(); ++i) {
    microseconds.push_back(variant.seconds[i] * 1e6);
    paired.push_back(dense.seconds[i] / variant.seconds[i]);
  }
  nlohmann::ordered_json out;
  out["policy"] = policy_json(variant.policy);
  out["ran"] = variant.paths;
  out["us_per_step"] = Distribution(microseconds).json();
  out["us_samples"] = microseconds;
  out["bytes_per_step"] = bytes;
  out["bytes_ratio"] = variant.totals.bytes_ratio();
  out["gb_per_second"] = bytes / time.median * 1e-9;
  out["bandwidth_share"] = bytes / time.median * 1e-9 / peak();
  out["us_bound"] = bytes / peak() * 1e-3;
  out["speedup"] = Distribution(dense.seconds).median / time.median;
  out["speedup_of_minima"] = Distribution(dense.seconds).min / time.min;
  out["speedup_paired"] = Distribution(paired).json();
  out["candidates"] = Distribution(variant.candidates).json();
  out["kept"] = Distribution(variant.kept).json();
  out["union"] = Distribution(variant.unions).json();
  out["estimated_mass"] = Distribution(variant.estimated_mass).json();
  out["true_mass"] = Distribution(variant.true_mass).json();
  nlohmann::ordered_json difference;
  difference["max_abs"] = variant.max_difference;
  difference["mean_abs"] = variant.difference_sum /
                           static_cast<double>(std::max<std::size_t>(variant.difference_count, 1));
  difference["cosine"] = Distribution(variant.cosines).json();
  out["against_dense"] = difference;
  return out;
}

nlohmann::ordered_json OpBench::json() const {
  const auto microseconds = [](std::vector<double> seconds) {
    for (double& value : seconds) value *= 1e6;
    return Distribution(std::move(seconds)).json();
  };
  nlohmann::ordered_json out;
  out["benchmark"] = "op";
  out["device"] = device_.description();
  out["batch"] = flags_.batch;
  out["context"] = flags_.context;
  out["num_q_heads"] = shape_.num_q_heads;
  out["num_kv_heads"] = shape_.num_kv_heads;
  out["head_dim"] = shape_.head_dim;
  out["page_size"] = flags_.bench.attention.page_size;
  out["dtype"] = flags_.dtype;
  out["data"] = workload_->json();
  out["copies"] = num_copies_;
  out["state_bytes"] = state_bytes_;
  out["kv_bytes"] = data_bytes() * num_copies_;
  out["last_level_cache_bytes"] = cache_bytes_;
  out["cache_walk_bytes"] = walk_->bytes();
  out["repeats"] = flags_.repeats;
  out["read_bandwidth_gb_per_second"] = bandwidth_;
  out["load_average"] = {load_before_, load_after_};
  out["begin_us"] = microseconds(begin_seconds_);
  out["append_us"] = microseconds(append_seconds_);
  out["results"] = nlohmann::ordered_json::array();
  for (const Variant& variant : variants_) out["results"].push_back(variant_json(variant));
  return out;
}

void OpBench::print() const {
  std::printf(
      "One layer, one decode step on %s: B %d, N %d, %d query and %d KV heads, D %d, P %d, "
      "%s\n",
      device_.description().c_str(), flags_.batch, flags_.context, shape_.num_q_heads,
      shape_.num_kv_heads, shape_.head_dim, flags_.bench.attention.page_size, flags_.dtype.c_str());
  std::printf("Data: %s\n", workload_->text().c_str());
  const std::string copies =
      num_copies_ == 1 ? std::string("1 batch") : std::to_string(num_copies_) + " batches in turn";
  std::printf(
      "Memory: %s of keys, values and index, all distinct, %s; %s walked before every step "
      "(cache %s)\n",
      bytes_text(static_cast<double>(state_bytes_)).c_str(), copies.c_str(),
      bytes_text(static_cast<double>(walk_->bytes())).c_str(),
      bytes_text(static_cast<double>(cache_bytes_)).c_str());
  std::printf("Read bandwidth: %s GB/s before, %s GB/s after; load average %.1f, %.1f\n\n",
              fixed(bandwidth_.front(), 1).c_str(), fixed(bandwidth_.back(), 1).c_str(),
              load_before_, load_after_);
  Table times, sets;
  times.add({"", "us/step", "min", "max", "MB read", "of dense", "GB/s", "of peak", "speed-up",
             "of minima"});
  sets.add({"", "candidates", "kept", "min / p10 / median / p90 / max", "union", "est. mass",
            "true mass", "max diff", "mean diff", "cosine", "ran"});
  for (const Variant& variant : variants_) {
    const nlohmann::ordered_json r = variant_json(variant);
    const auto number = [&r](const char* key) { return r[key].get<double>(); };
    const auto& us = r["us_per_step"];
    times.add({variant.policy.name, fixed(us["median"].get<double>(), 0),
               fixed(us["min"].get<double>(), 0), fixed(us["max"].get<double>(), 0),
               fixed(number("bytes_per_step") * 1e-6, 1),
               fixed(100 * number("bytes_ratio"), 1) + " %", fixed(number("gb_per_second"), 1),
               fixed(100 * number("bandwidth_share"), 0) + " %", fixed(number("speedup"), 2) + "x",
               fixed(number("speedup_of_minima"), 2) + "x"});
    std::string ran;
    for (const std::string& path : variant.paths) ran += (ran.empty() ? "" : ", ") + path;
    if (variant.policy.is_dense()) ran = "dense";
    const auto& difference = r["against_dense"];
    sets.add({variant.policy.name, fixed(r["candidates"]["mean"].get<double>(), 0),
              fixed(r["kept"]["mean"].get<double>(), 0), Distribution(variant.kept).text(0),
              fixed(r["union"]["mean"].get<double>(), 0),
              fixed(r["estimated_mass"]["mean"].get<double>(), 3),
              fixed(r["true_mass"]["mean"].get<double>(), 3),
              digits3(difference["max_abs"].get<double>()),
              digits3(difference["mean_abs"].get<double>()),
              fixed(difference["cosine"]["mean"].get<double>(), 4), ran});
  }
  std::printf("%s\n%s\n", times.text().c_str(), sets.text().c_str());
  std::printf(
      "Medians of %d interleaved rounds. Outside the step, once for all layers: page tables "
      "%.0f us; once a layer: writing the token and indexing a page it fills %.0f us.\n",
      flags_.repeats, Distribution(begin_seconds_).median * 1e6,
      Distribution(append_seconds_).median * 1e6);
}

}  // namespace

int run_bench_op(const OpFlags& flags) {
  if (flags.model.empty() && (!flags.text.empty() || flags.layer >= 0)) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] --text and --layer, got no --from-model, accepted only together with it");
  }
  (void)parse_dtype(flags.dtype);
  (void)bench_policies(flags.bench.attention);
  OutputFile file;
  if (!flags.bench.out.empty()) file = OutputFile(flags.bench.out, flags.bench.force);
  OpBench bench(flags, Device(flags.bench.common.device));
  if (!bench.run()) return kInterruptedExit;
  const nlohmann::ordered_json report = bench.json();
  if (file.is_open()) file.commit(report.dump(1) + "\n");
  if (flags.bench.common.json) {
    std::printf("%s\n", report.dump(2).c_str());
  } else {
    bench.print();
  }
  return 0;
}

}  // namespace twilight::app
