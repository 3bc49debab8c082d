#include "bench_decode.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "distribution.h"
#include "interrupt.h"
#include "output.h"
#include "paths.h"
#include "progress.h"
#include "stats_json.h"
#include "table.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr std::int32_t kBlocks = 8;  // turns that each policy gets, if there are tokens enough

/// One policy's continuation of the text and how long its steps took.
struct Variant {
  SparsePolicy policy;
  std::optional<Sequence> sequence;
  std::int32_t next = 0;             // the token to run
  std::vector<std::int32_t> tokens;  // chosen so far
  std::vector<double> seconds;
  DecodeTotals totals;
  std::map<std::string, std::int64_t> paths;  // layer steps by what ran
};

std::int32_t likeliest(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

class DecodeBench {
 public:
  DecodeBench(const DecodeFlags& flags, const Device& device, Model model,
              std::vector<std::int32_t> prompt)
      : flags_(flags), device_(device), model_(std::move(model)), prompt_(std::move(prompt)) {}

  /// False where the user stopped it.
  bool run();
  [[nodiscard]] nlohmann::ordered_json json() const;
  void print() const;

 private:
  void make_engine();
  bool read_prompt();
  void step(Variant& variant, bool timed);
  [[nodiscard]] nlohmann::ordered_json variant_json(const Variant& variant) const;
  [[nodiscard]] double peak() const {
    return *std::max_element(bandwidth_.begin(), bandwidth_.end());
  }
  /// Weights that a decode step reads. An embedding table of its own gives one row only.
  [[nodiscard]] double weight_bytes() const {
    const ModelInfo& info = model_.info();
    const double all = static_cast<double>(info.weight_bytes);
    if (info.tied_embeddings || info.parameters == 0) return all;
    return all - all / static_cast<double>(info.parameters) * info.vocab_size * info.hidden_size;
  }

  const DecodeFlags& flags_;
  Device device_;
  Model model_;
  std::vector<std::int32_t> prompt_;
  std::unique_ptr<Engine> engine_;
  std::optional<Sequence> base_;
  std::vector<Variant> variants_;
  std::vector<float> logits_;
  double prefill_seconds_ = 0;
  std::vector<double> bandwidth_;
  double load_before_ = 0, load_after_ = 0;
};

void DecodeBench::make_engine() {
  const std::vector<SparsePolicy> policies = bench_policies(flags_.bench.attention);
  const std::int64_t longest = std::int64_t{flags_.context} + flags_.tokens + 1;
  if (longest > model_.info().max_context) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] --ctx and --tokens, got " + std::to_string(flags_.context) + " + " +
                    std::to_string(flags_.tokens) + " tokens, accepted up to the model's " +
                    std::to_string(model_.info().max_context) + " less one");
  }
  EngineOptions options;
  options.policy = policies.front();
  options.page_size = flags_.bench.attention.page_size;
  options.max_context = static_cast<std::int32_t>(longest);
  // Continuations share the prompt's full pages and have the rest to themselves, one more for the
  // untimed steps.
  options.cache_tokens = longest + static_cast<std::int64_t>(policies.size() + 1) *
                                       (flags_.tokens + 1 + 2 * std::int64_t{options.page_size});
  engine_ = std::make_unique<Engine>(device_, model_, options);
  for (const SparsePolicy& policy : policies) {
    // Also widens the index to what every policy reads, and settles where sparse starts to win.
    engine_->set_policy(policy);
    variants_.emplace_back().policy = engine_->policy();
  }
  logits_.resize(static_cast<std::size_t>(model_.info().vocab_size));
}

bool DecodeBench::read_prompt() {
  base_ = engine_->cache().new_sequence();
  ProgressBar bar("Reading the text", "tokens", !flags_.bench.common.json);
  const Stopwatch watch;
  const Engine::Status status = engine_->prefill(*base_, prompt_, logits_, bar.callback());
  prefill_seconds_ = watch.seconds();
  if (status == Engine::Status::kOutOfPages) {
    throw Error(ErrorCode::kInternal, "[bench] the cache made for the text ran out of pages");
  }
  return status == Engine::Status::kOk;
}

void DecodeBench::step(Variant& variant, bool timed) {
  std::optional<Sequence> scratch;
  if (!timed) scratch = variant.sequence->fork();
  Sequence* const batch[] = {timed ? &*variant.sequence : &*scratch};
  const std::int32_t token[] = {variant.next};
  const Stopwatch watch;
  const Engine::Status status = engine_->decode(batch, token, logits_);
  const double seconds = watch.seconds();
  if (status != Engine::Status::kOk) {
    throw Error(ErrorCode::kInternal, "[bench] the cache made for the text ran out of pages");
  }
  if (!timed) return;
  variant.seconds.push_back(seconds);
  variant.next = likeliest(logits_);
  variant.tokens.push_back(variant.next);
  for (std::int32_t layer = 0; layer < model_.info().num_layers; ++layer) {
    for (const LayerStats& stats : engine_->last_stats(layer)) {
      ++variant.paths[std::string(step_path_name(stats.path))];
    }
  }
}

bool DecodeBench::run() {
  make_engine();
  load_before_ = load_average();
  bandwidth_.push_back(measure_read_bandwidth(device_));
  if (!read_prompt()) return false;
  const std::int32_t first = likeliest(logits_);
  for (Variant& variant : variants_) {
    variant.sequence = base_->fork();
    variant.next = first;
  }
  ProgressBar bar("Decoding", "tokens", !flags_.bench.common.json);
  const std::int32_t block = std::max(1, (flags_.tokens + kBlocks - 1) / kBlocks);
  const std::int64_t total = static_cast<std::int64_t>(variants_.size()) * flags_.tokens;
  std::int64_t done = 0;
  for (std::int32_t begin = 0; begin < flags_.tokens; begin += block) {
    const std::int32_t count = std::min(block, flags_.tokens - begin);
    for (Variant& variant : variants_) {
      engine_->set_policy(variant.policy);
      step(variant, false);  // touches the new policy's memory; its result is dropped
      engine_->reset_totals();
      for (std::int32_t i = 0; i < count; ++i) {
        if (interrupted()) return false;
        step(variant, true);
        bar.update(++done, total);
      }
      variant.totals.merge(engine_->totals());
    }
  }
  bandwidth_.push_back(measure_read_bandwidth(device_));
  load_after_ = load_average();
  return true;
}

nlohmann::ordered_json DecodeBench::variant_json(const Variant& variant) const {
  const Variant& dense = variants_.front();
  std::vector<double> milliseconds;
  for (const double seconds : variant.seconds) milliseconds.push_back(seconds * 1e3);
  const Distribution time(milliseconds);
  const auto steps = static_cast<double>(std::max<std::int64_t>(variant.totals.steps, 1));
  const double kv_bytes = static_cast<double>(variant.totals.bytes_read) / steps;
  const auto same = std::mismatch(dense.tokens.begin(), dense.tokens.end(), variant.tokens.begin(),
                                  variant.tokens.end());
  nlohmann::ordered_json out;
  out["policy"] = policy_json(variant.policy);
  out["ran_layer_steps"] = variant.paths;
  out["ms_per_token"] = time.json();
  out["ms_samples"] = milliseconds;
  out["tokens_per_second"] = 1e3 / time.median;
  out["speedup"] = Distribution(dense.seconds).median * 1e3 / time.median;
  out["speedup_of_minima"] = Distribution(dense.seconds).min * 1e3 / time.min;
  out["kv_bytes_per_token"] = kv_bytes;
  out["kv_bytes_ratio"] = variant.totals.bytes_ratio();
  out["weight_bytes_per_token"] = weight_bytes();
  out["ms_bound"] = (kv_bytes + weight_bytes()) / peak() * 1e-6;
  out["bandwidth_share"] = out["ms_bound"].get<double>() / time.median;
  out["attention"] = totals_json(variant.totals);
  out["tokens_same_as_dense"] = same.first - dense.tokens.begin();
  out["tokens"] = variant.tokens;
  return out;
}

nlohmann::ordered_json DecodeBench::json() const {
  nlohmann::ordered_json out;
  out["benchmark"] = "decode";
  out["device"] = device_.description();
  out["model"] = model_.info().path;
  out["context"] = flags_.context;
  out["tokens"] = flags_.tokens;
  out["page_size"] = flags_.bench.attention.page_size;
  out["prefill_seconds"] = prefill_seconds_;
  out["prefill_tokens_per_second"] = static_cast<double>(prompt_.size()) / prefill_seconds_;
  out["weight_bytes"] = model_.info().weight_bytes;
  out["read_bandwidth_gb_per_second"] = bandwidth_;
  out["load_average"] = {load_before_, load_after_};
  out["results"] = nlohmann::ordered_json::array();
  for (const Variant& variant : variants_) out["results"].push_back(variant_json(variant));
  return out;
}

void DecodeBench::print() const {
  const ModelInfo& info = model_.info();
  std::printf("Decoding with %s on %s: %d tokens read, %d decoded with each policy in turn\n",
              info.path.c_str(), device_.description().c_str(), flags_.context, flags_.tokens);
  std::printf("Prefill %.0f tokens/s, indexing included; weights read per token %s\n",
              static_cast<double>(prompt_.size()) / prefill_seconds_,
              bytes_text(weight_bytes()).c_str());
  std::printf("Read bandwidth: %.1f GB/s before, %.1f GB/s after; load average %.1f, %.1f\n\n",
              bandwidth_.front(), bandwidth_.back(), load_before_, load_after_);
  Table times, sets;
  times.add({"", "ms/token", "min", "max", "tokens/s", "speed-up", "of minima", "KV MB/token",
             "of dense", "bound ms", "of bound"});
  sets.add({"", "candidates", "kept", "union", "est. mass", "same tokens", "layer steps that ran"});
  for (const Variant& variant : variants_) {
    const nlohmann::ordered_json r = variant_json(variant);
    const auto number = [&r](const char* key) { return r[key].get<double>(); };
    const auto& ms = r["ms_per_token"];
    times.add({variant.policy.name, digits3(ms["median"].get<double>()),
               digits3(ms["min"].get<double>()), digits3(ms["max"].get<double>()),
               digits3(number("tokens_per_second")), fixed(number("speedup"), 2) + "x",
               fixed(number("speedup_of_minima"), 2) + "x",
               digits3(number("kv_bytes_per_token") * 1e-6),
               fixed(100 * number("kv_bytes_ratio"), 1) + " %", digits3(number("ms_bound")),
               fixed(100 * number("bandwidth_share"), 0) + " %"});
    std::string ran;
    for (const auto& [path, count] : variant.paths) {
      const bool sparse = path == step_path_name(StepPath::kSparse);
      ran += (ran.empty() ? "" : ", ") + std::to_string(count) +
             (sparse ? " sparse" : " dense (" + path + ")");
    }
    const DecodeTotals& totals = variant.totals;
    const bool any = totals.sparse_layers > 0;
    sets.add({variant.policy.name, any ? fixed(totals.candidates_mean(), 0) : "-",
              any ? fixed(totals.kept_mean(), 0) : "-",
              any ? fixed(totals.attended_mean(), 0) : "-",
              any ? fixed(totals.estimated_mass_mean(), 3) : "-",
              std::to_string(r["tokens_same_as_dense"].get<std::int64_t>()) + " / " +
                  std::to_string(flags_.tokens),
              ran});
  }
  std::printf("%s\n%s\n", times.text().c_str(), sets.text().c_str());
  std::printf("Every step indexes the page that it fills, dense ones too.\n");
  const bool any_short = std::any_of(variants_.begin(), variants_.end(), [](const Variant& v) {
    return v.paths.count(std::string(step_path_name(StepPath::kDenseShort))) > 0;
  });
  if (any_short) {
    std::printf(
        "Short: below the length where sparse was measured to win here; --dense-below 0 "
        "times the policy all the same.\n");
  }
}

}  // namespace

int run_bench_decode(const DecodeFlags& flags) {
  (void)bench_policies(flags.bench.attention);
  const std::string path = flags.model.empty() ? bundled_model() : flags.model;
  const std::string text_path = flags.text.empty() ? bundled_novel() : flags.text;
  const std::string text = read_text(text_path);
  OutputFile file;
  if (!flags.bench.out.empty()) file = OutputFile(flags.bench.out, flags.bench.force);
  const Device device(flags.bench.common.device);
  Model model = load_model(path, flags.bench.common, flags.bench.attention);
  std::vector<std::int32_t> prompt = model.encode(text);
  if (static_cast<std::int64_t>(prompt.size()) < flags.context) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] text " + text_path + ", got " + std::to_string(prompt.size()) +
                    " tokens, accepted at least --ctx " + std::to_string(flags.context));
  }
  prompt.resize(static_cast<std::size_t>(flags.context));
  DecodeBench bench(flags, device, std::move(model), std::move(prompt));
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
