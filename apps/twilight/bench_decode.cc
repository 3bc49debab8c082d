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

/// One policy's continuations of the text and how long its steps took.
struct Variant {
  SparsePolicy policy;
  std::int32_t number = 0;  // of the engine's policies; 0 where it must be set before it runs
  std::vector<Sequence> sequences;
  std::vector<std::int32_t> next;    // the tokens to run
  std::vector<std::int32_t> tokens;  // chosen so far for the first sequence
  std::vector<double> seconds;
  DecodeTotals totals;
  std::map<std::string, std::int64_t> paths;  // layer steps by what ran
};

std::int32_t likeliest(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

class DecodeBench {
 public:
  DecodeBench(const DecodeFlags& flags, const Device& device, const Model& model,
              std::vector<std::int32_t> prompt)
      : flags_(flags), device_(device), model_(model), prompt_(std::move(prompt)) {}

  /// False where the user stopped it.
  bool run();
  [[nodiscard]] nlohmann::ordered_json json() const;
  void print() const;

 private:
  void make_engine();
  bool read_prompt();
  void copy_prompt();
  void turn_to(Variant& variant);
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
  std::vector<Sequence> base_;  // the prompt, once a sequence of the batch
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
  options.page_size = flags_.bench.attention.page_size();
  options.max_context = static_cast<std::int32_t>(longest);
  options.max_seqs = flags_.batch;
  // Continuations share the prompt's full pages and have the rest to themselves, one more for the
  // untimed steps.
  const std::int64_t own = static_cast<std::int64_t>(policies.size() + 1) *
                           (flags_.tokens + 1 + 2 * std::int64_t{options.page_size});
  options.cache_tokens = flags_.batch * (longest + own);
  engine_ = std::make_unique<Engine>(device_, model_, options);
  for (const SparsePolicy& policy : policies) {
    // Also widens the index to what every policy reads, and settles where sparse starts to win.
    engine_->set_policy(policy);
    variants_.emplace_back().policy = engine_->policy();
  }
  const bool together = std::ranges::all_of(
      variants_, [&](const Variant& variant) { return engine_->serves(variant.policy); });
  for (Variant& variant : variants_) {
    if (together) variant.number = engine_->add_policy(variant.policy);
  }
  logits_.resize(static_cast<std::size_t>(model_.info().vocab_size));
}

bool DecodeBench::read_prompt() {
  base_.push_back(engine_->cache().new_sequence());
  ProgressBar bar("Reading the text", "tokens", !flags_.bench.common.json);
  // Libraries choose their kernels before the clock starts.
  Sequence scratch = engine_->cache().new_sequence();
  const std::size_t some = std::min<std::size_t>(
      prompt_.size(), static_cast<std::size_t>(engine_->options().prefill_chunk));
  (void)engine_->prefill(scratch, std::span(prompt_).first(some), logits_);
  scratch.truncate(0);
  const Stopwatch watch;
  const Engine::Status status = engine_->prefill(base_[0], prompt_, logits_, bar.callback());
  prefill_seconds_ = watch.seconds();
  if (status == Engine::Status::kOutOfPages) {
    throw Error(ErrorCode::kInternal, "[bench] the cache made for the text ran out of pages");
  }
  return status == Engine::Status::kOk;
}

void DecodeBench::copy_prompt() {
  while (base_.size() < static_cast<std::size_t>(flags_.batch)) {
    std::optional<Sequence> copy = engine_->cache().copy(base_[0]);
    if (!copy) {
      throw Error(ErrorCode::kInternal, "[bench] the cache made for the text ran out of pages");
    }
    base_.push_back(std::move(*copy));
  }
}

void DecodeBench::step(Variant& variant, bool timed) {
  std::vector<Sequence> scratch;
  std::vector<Sequence*> batch;
  for (Sequence& sequence : variant.sequences) {
    if (!timed) scratch.push_back(sequence.fork());
    batch.push_back(&sequence);
  }
  // Pointers hold once the forks are made.
  for (std::size_t i = 0; !timed && i < batch.size(); ++i) batch[i] = &scratch[i];
  std::vector<std::int32_t> next(batch.size());
  const Stopwatch watch;
  const Engine::Status status = engine_->decode_greedy(batch, variant.next, next, variant.number);
  const double seconds = watch.seconds();
  if (status != Engine::Status::kOk) {
    throw Error(ErrorCode::kInternal, "[bench] the cache made for the text ran out of pages");
  }
  if (!timed) return;
  variant.seconds.push_back(seconds);
  variant.next = std::move(next);
  variant.tokens.push_back(variant.next.front());
}

// What precedes timed steps: one that is counted, and two that let a device record its launches and
// touch the policy's memory. Their results are dropped.
void DecodeBench::turn_to(Variant& variant) {
  if (variant.number == 0) engine_->set_policy(variant.policy);
  engine_->collect_stats(true);
  engine_->reset_totals();
  step(variant, false);
  variant.totals.merge(engine_->totals());
  for (std::int32_t layer = 0; layer < model_.info().num_layers; ++layer) {
    for (const LayerStats& stats : engine_->last_stats(layer)) {
      ++variant.paths[std::string(step_path_name(stats.path))];
    }
  }
  engine_->collect_stats(false);
  for (int i = 0; i < 2; ++i) step(variant, false);
}

bool DecodeBench::run() {
  make_engine();
  flags_.bench.attention.announce(flags_.bench.common);
  load_before_ = load_average();
  bandwidth_.push_back(measure_read_bandwidth(device_));
  if (!read_prompt()) return false;
  const std::int32_t first = likeliest(logits_);
  copy_prompt();
  for (Variant& variant : variants_) {
    for (const Sequence& sequence : base_) variant.sequences.push_back(sequence.fork());
    variant.next.assign(base_.size(), first);
  }
  ProgressBar bar("Decoding", "steps", !flags_.bench.common.json);
  const std::int32_t block = std::max(1, (flags_.tokens + kBlocks - 1) / kBlocks);
  const std::int64_t total = static_cast<std::int64_t>(variants_.size()) * flags_.tokens;
  std::int64_t done = 0;
  for (std::int32_t begin = 0; begin < flags_.tokens; begin += block) {
    const std::int32_t count = std::min(block, flags_.tokens - begin);
    for (Variant& variant : variants_) {
      turn_to(variant);
      for (std::int32_t i = 0; i < count; ++i) {
        if (interrupted()) return false;
        step(variant, true);
        bar.update(++done, total);
      }
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
  const double kv_bytes = static_cast<double>(variant.totals.bytes_read) / steps;  // a sequence
  const auto same = std::mismatch(dense.tokens.begin(), dense.tokens.end(), variant.tokens.begin(),
                                  variant.tokens.end());
  nlohmann::ordered_json out;
  out["policy"] = policy_json(variant.policy);
  out["ran_layer_steps"] = variant.paths;
  out["ms_per_token"] = time.json();
  out["ms_samples"] = milliseconds;
  out["tokens_per_second"] = flags_.batch * 1e3 / time.median;
  out["speedup"] = Distribution(dense.seconds).median * 1e3 / time.median;
  out["speedup_of_minima"] = Distribution(dense.seconds).min * 1e3 / time.min;
  out["kv_bytes_per_token"] = kv_bytes;
  out["kv_bytes_ratio"] = variant.totals.bytes_ratio();
  out["weight_bytes_per_step"] = weight_bytes();
  out["ms_bound"] = (flags_.batch * kv_bytes + weight_bytes()) / peak() * 1e-6;
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
  flags_.bench.attention.report(out);
  out["context"] = flags_.context;
  out["batch"] = flags_.batch;
  out["tokens"] = flags_.tokens;
  out["page_size"] = flags_.bench.attention.page_size();
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
  std::printf(
      "Decoding with %s on %s: %d tokens read, %d decoded with each policy in turn, batch %d\n",
      info.path.c_str(), device_.description().c_str(), flags_.context, flags_.tokens,
      flags_.batch);
  std::printf("Prefill %.0f tokens/s, indexing included; weights read per step %s\n",
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
  const std::string text_path = flags.text.empty() ? bundled_novel() : flags.text;
  const std::string text = read_text(text_path);
  OutputFile file;
  if (!flags.bench.out.empty()) file = OutputFile(flags.bench.out, flags.bench.force);
  const Device device(flags.bench.common.device);
  const Model model = load_model(flags.model, flags.bench.common, flags.bench.attention);
  std::vector<std::int32_t> prompt = model.encode(text);
  if (static_cast<std::int64_t>(prompt.size()) < flags.context) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] text " + text_path + ", got " + std::to_string(prompt.size()) +
                    " tokens, accepted at least --ctx " + std::to_string(flags.context));
  }
  prompt.resize(static_cast<std::size_t>(flags.context));
  DecodeBench bench(flags, device, model, std::move(prompt));
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
