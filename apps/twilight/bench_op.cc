#include "bench_op.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bench_op_report.h"
#include "interrupt.h"
#include "output.h"
#include "paths.h"
#include "progress.h"
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
  std::vector<float> k, v, q;  // [B, Hkv, D], [B, Hkv, D], [B, Hq, D]
};

/// A cache with the index planes of one policy, and the data in it. Every sparse policy has its
/// own, since planes of different summaries cannot share a cache; dense reads the first.
struct Store {
  std::unique_ptr<KvCache> cache;
  std::vector<Copy> copies;
};

struct Variant {
  OpResult result;
  std::size_t store = 0;
  std::unique_ptr<Attention> attention;
};

class OpBench {
 public:
  OpBench(const OpFlags& flags, const Device& device) : flags_(flags), device_(device) {
    cache_bytes_ = last_level_cache_bytes();
  }

  /// False where the user stopped it.
  bool run() {
    settle();
    make_stores();
    if (!make_workload()) return false;
    for (std::size_t i = 0; i < stores_.size(); ++i) {
      if (!fill(stores_[i], i)) return false;
    }
    if (!check_outputs()) return false;
    walk_ = std::make_unique<CacheWalk>(kCacheMultiple * cache_bytes_, device_.threads());
    const std::int64_t probe = std::max(walk_->bytes(), std::int64_t{256} << 20);
    report_.load.push_back(load_average());
    report_.bandwidth.push_back(measure_read_bandwidth(device_, probe));
    if (!time_steps()) return false;
    report_.bandwidth.push_back(measure_read_bandwidth(device_, probe));
    report_.load.push_back(load_average());
    fill_report();
    return true;
  }

  [[nodiscard]] const OpReport& report() const { return report_; }

 private:
  void settle();
  [[nodiscard]] SparsePolicy for_one_layer(SparsePolicy policy) const;
  void make_stores();
  bool make_workload();
  bool fill(Store& store, std::size_t index);
  bool check_outputs();
  bool time_steps();
  void fill_report();
  [[nodiscard]] std::int64_t data_bytes() const {
    return std::int64_t{flags_.batch} * flags_.context * shape_.num_kv_heads * shape_.head_dim * 2 *
           dtype_bytes(parse_dtype(flags_.dtype));
  }

  const OpFlags& flags_;
  Device device_;
  LayerShape shape_;
  std::int64_t cache_bytes_;
  std::int32_t num_copies_ = 1;
  std::int64_t state_bytes_ = 0;
  std::optional<Model> model_;
  std::unique_ptr<Workload> workload_;
  std::vector<Store> stores_;
  std::vector<Variant> variants_;
  std::vector<std::vector<float>> dense_out_;  // [copy][B, Hq, D]
  std::unique_ptr<CacheWalk> walk_;
  OpReport report_;
};

// A profile's policy is for all layers of its model.
SparsePolicy OpBench::for_one_layer(SparsePolicy policy) const {
  policy.dense_layers = 0;
  policy.dense_below_tokens = 0;
  if (!policy.layer_p.empty()) {
    if (model_) {
      const std::int32_t layer = capture_layer(model_->info(), flags_.layer);
      policy.p = policy.layer_p.at(static_cast<std::size_t>(layer));
    }
    policy.layer_p.clear();
  }
  if (policy.selector == "double_sparsity") {
    if (!model_) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[bench] selector double_sparsity on planted keys, got no --from-model, accepted "
                  "with the model that the labels of --profile are for");
    }
    const auto row = policy.num_labels * model_->info().num_kv_heads;
    const auto first =
        policy.labels.begin() + std::ptrdiff_t{row} * capture_layer(model_->info(), flags_.layer);
    policy.labels = std::vector<std::int32_t>(first, first + row);
  }
  return policy;
}

void OpBench::settle() {
  shape_ = flags_.shape;
  if (!flags_.model.empty()) {
    model_ = load_model(flags_.model, flags_.bench.common, flags_.bench.attention);
    shape_ = {model_->info().num_q_heads, model_->info().num_kv_heads, model_->info().head_dim};
  }
  for (SparsePolicy& policy : bench_policies(flags_.bench.attention)) {
    variants_.emplace_back().result.policy = for_one_layer(std::move(policy));
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

void OpBench::make_stores() {
  KvCacheOptions options;
  options.num_layers = 1;
  options.num_kv_heads = shape_.num_kv_heads;
  options.head_dim = shape_.head_dim;
  options.page_size = flags_.bench.attention.page_size();
  options.dtype = parse_dtype(flags_.dtype);
  std::vector<const SparsePolicy*> policies;  // of each store
  for (Variant& variant : variants_) {
    variant.store = policies.size();
    if (variant.result.policy.is_dense()) {
      variant.store = 0;
    } else {
      policies.push_back(&variant.result.policy);
    }
  }
  if (policies.empty()) policies.push_back(&variants_.front().result.policy);
  const auto with_index = [&](const SparsePolicy& policy, std::int64_t pages) {
    options.num_pages = static_cast<std::int32_t>(pages);
    return std::make_unique<KvCache>(device_, options, policy);
  };
  std::int64_t bytes_per_page = 0;
  for (const SparsePolicy* policy : policies) {
    bytes_per_page += with_index(*policy, 1)->bytes_per_page();
  }
  const std::int64_t pages = (std::int64_t{flags_.context} + options.page_size - 1) /
                             options.page_size * flags_.batch * num_copies_;
  state_bytes_ = pages * bytes_per_page;
  const double room = kMemoryShare * static_cast<double>(available_memory_bytes());
  if (static_cast<double>(state_bytes_) > room || pages > (1 << 30)) {
    throw Error(ErrorCode::kOutOfMemory,
                "[bench] keys, values and index of " + std::to_string(num_copies_ * flags_.batch) +
                    " sequences of " + std::to_string(flags_.context) + " tokens, got " +
                    bytes_text(static_cast<double>(state_bytes_)) + ", accepted up to " +
                    bytes_text(room) +
                    " of the memory available now; lower --batch or --ctx, or compare fewer "
                    "presets at once");
  }
  for (const SparsePolicy* policy : policies) {
    stores_.emplace_back().cache = with_index(*policy, pages);
  }
  for (Variant& variant : variants_) {
    variant.attention = std::make_unique<Attention>(
        *stores_[variant.store].cache, variant.result.policy,
        AttentionLimits{shape_.num_q_heads, flags_.batch, flags_.context});
  }
}

bool OpBench::fill(Store& store, std::size_t index) {
  const std::size_t row = static_cast<std::size_t>(shape_.num_kv_heads * shape_.head_dim);
  Attention writer(*store.cache, make_policy("dense"),
                   AttentionLimits{shape_.num_q_heads, 1, flags_.context});
  std::vector<float> k(kFillTokens * row), v(k.size());
  ProgressBar bar("Making keys and values", "tokens", !flags_.bench.common.json);
  const std::int64_t each = std::int64_t{num_copies_} * flags_.batch * flags_.context;
  const std::int64_t total = each * static_cast<std::int64_t>(stores_.size());
  std::int64_t done = each * static_cast<std::int64_t>(index);
  for (std::int32_t c = 0; c < num_copies_; ++c) {
    Copy& copy = store.copies.emplace_back();
    copy.k.resize(static_cast<std::size_t>(flags_.batch) * row);
    copy.v.resize(copy.k.size());
    for (std::int32_t b = 0; b < flags_.batch; ++b) {
      const std::int32_t seq = c * flags_.batch + b;
      workload_->prepare(seq);
      copy.sequences.push_back(store.cache->new_sequence());
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
  for (Copy& copy : store.copies) {
    for (Sequence& sequence : copy.sequences) copy.batch.push_back(&sequence);
  }
  return true;
}

bool OpBench::check_outputs() {
  std::vector<float> out;
  ProgressBar bar("Checking outputs", "", !flags_.bench.common.json);
  std::int64_t done = 0;
  for (Variant& variant : variants_) {
    Attention& attention = *variant.attention;
    attention.collect_stats(true, true);
    std::vector<Copy>& copies = stores_[variant.store].copies;
    for (std::size_t c = 0; c < copies.size(); ++c) {
      Copy& copy = copies[c];
      if (interrupted()) return false;
      bar.update(done++, static_cast<std::int64_t>(variants_.size() * copies.size()));
      out.assign(copy.q.size(), 0.0F);
      if (!attention.begin(copy.batch, 1)) {
        throw Error(ErrorCode::kInternal, "[bench] the cache made for the data ran out of pages");
      }
      attention.append(0, copy.k.data(), copy.v.data());
      attention.decode(0, copy.q.data(), out.data());
      for (const LayerStats& stats : attention.stats(0)) {
        variant.result.add(stats);
      }
      attention.rollback();
      if (&variant == &variants_.front()) dense_out_.push_back(out);
      variant.result.compare(dense_out_[c], out, shape_.head_dim);
    }
    attention.collect_stats(false);
  }
  return true;
}

bool OpBench::time_steps() {
  std::vector<float> out(stores_.front().copies.front().q.size());
  ProgressBar bar("Timing", "rounds", !flags_.bench.common.json);
  for (std::int32_t round = -1; round < flags_.repeats; ++round) {  // round -1 warms up
    bar.update(round + 1, flags_.repeats + 1);
    for (std::size_t i = 0; i < variants_.size(); ++i) {
      if (interrupted()) return false;
      Variant& variant = variants_[i];
      std::vector<Copy>& copies = stores_[variant.store].copies;
      Copy& copy = copies[(static_cast<std::size_t>(round + 1) + i) % copies.size()];
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
      variant.result.seconds.push_back(seconds);
      report_.begin_seconds.push_back(begin_seconds);
      report_.append_seconds.push_back(append_seconds);
    }
  }
  return true;
}

void OpBench::fill_report() {
  report_.device = device_.description();
  report_.dtype = flags_.dtype;
  report_.data = workload_->text();
  report_.data_json = workload_->json();
  report_.batch = flags_.batch;
  report_.context = flags_.context;
  report_.page_size = flags_.bench.attention.page_size();
  report_.copies = num_copies_;
  report_.repeats = flags_.repeats;
  report_.shape = shape_;
  report_.state_bytes = state_bytes_;
  report_.kv_bytes = data_bytes() * num_copies_ * static_cast<std::int64_t>(stores_.size());
  report_.cache_bytes = cache_bytes_;
  report_.walk_bytes = walk_->bytes();
  for (const Variant& variant : variants_) report_.results.push_back(&variant.result);
}

}  // namespace

int run_bench_op(const OpFlags& flags) {
  if (flags.model.empty() && (!flags.text.empty() || flags.layer >= 0)) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] --text and --layer, got no --from-model, accepted only together with it");
  }
  if (flags.bench.common.device.device.starts_with("cuda")) {
    throw Error(ErrorCode::kUnsupported, "[bench] --device, got '" +
                                             flags.bench.common.device.device +
                                             "', accepted cpu or ref: this benchmark's buffers are "
                                             "in host memory; bench/cuda/step_bench runs the op on "
                                             "a GPU");
  }
  (void)parse_dtype(flags.dtype);
  (void)bench_policies(flags.bench.attention);
  OutputFile file;
  if (!flags.bench.out.empty()) file = OutputFile(flags.bench.out, flags.bench.force);
  OpBench bench(flags, Device(flags.bench.common.device));
  if (!bench.run()) return kInterruptedExit;
  const nlohmann::ordered_json report = bench.report().json();
  if (file.is_open()) file.commit(report.dump(1) + "\n");
  if (flags.bench.common.json) {
    std::printf("%s\n", report.dump(2).c_str());
  } else {
    std::fputs(bench.report().text().c_str(), stdout);
  }
  return 0;
}

}  // namespace twilight::app
