#include "twilight/engine.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "core/check.h"
#include "engine/attention_impl.h"
#include "engine/crossover.h"
#include "engine/device_impl.h"
#include "engine/engine_sizes.h"
#include "engine/kv_cache_impl.h"
#include "engine/model_impl.h"
#include "engine/row_results.h"
#include "engine/sampler_impl.h"
#include "model/transformer.h"
#include "twilight/attention.h"

namespace twilight {
namespace {

class PrefillPort final : public AttentionPort {
 public:
  PrefillPort(Attention& attention, bool full_precision)
      : attention_(attention), full_precision_(full_precision) {}
  AppendKvParams append_params(std::int32_t layer, const float* k, const float* v) override {
    return attention_.impl().append_params(layer, k, v);
  }
  void seal(std::int32_t layer) override { attention_.impl().seal(layer); }
  void attend(std::int32_t layer, const float* q, float* out) override {
    attention_.prefill(layer, q, out, full_precision_);
  }

 private:
  Attention& attention_;
  bool full_precision_;
};

using QueryObserver = std::function<void(std::int32_t layer, const float* q)>;

class DecodePort final : public AttentionPort {
 public:
  /// `q_floats` is the size of the queries, which the observer sees in host memory.
  DecodePort(Attention& attention, const QueryObserver& observer, std::size_t q_floats)
      : attention_(attention), observer_(observer), q_floats_(q_floats) {}
  AppendKvParams append_params(std::int32_t layer, const float* k, const float* v) override {
    return attention_.impl().append_params(layer, k, v);
  }
  void seal(std::int32_t layer) override { attention_.impl().seal(layer); }
  void attend(std::int32_t layer, const float* q, float* out) override {
    if (observer_) observe(layer, q);
    attention_.decode(layer, q, out);
  }

 private:
  void observe(std::int32_t layer, const float* q) {
    DeviceMemory& memory = attention_.impl().memory;
    if (memory.is_host()) {
      observer_(layer, q);
      return;
    }
    std::vector<float> copy(q_floats_);
    memory.download(copy.data(), q, q_floats_ * sizeof(float));
    observer_(layer, copy.data());
  }

  Attention& attention_;
  const QueryObserver& observer_;
  std::size_t q_floats_;
};

void check_batch(std::span<Sequence* const> sequences, std::span<const std::int32_t> tokens) {
  require(sequences.size() == tokens.size(), "decode", "number of tokens, got ", tokens.size(),
          ", accepted one for each of the ", sequences.size(), " sequences");
}

}  // namespace

struct Engine::Impl {
  Impl(const Device& device_in, const Model& model_in, const EngineOptions& options_in)
      : device(device_in),
        model(model_in),
        options(settle(options_in, device_in, model_in.info())),
        transformer(*device.impl().backend, device.impl().pool, model.impl().config,
                    model.impl().weights, std::max(options.prefill_chunk, options.max_seqs),
                    options.full_precision),
        results(*device.impl().backend, transformer, model.info().vocab_size),
        cache(device,
              cache_options(options = size_cache(options, device, model.info()), model.info()),
              options.policy) {
    chunk.resize(static_cast<std::size_t>(std::max(options.prefill_chunk, options.max_seqs)));
    make_attention(options.policy);
  }

  std::unique_ptr<Attention> attention_of(SparsePolicy policy) {
    if (!policy.is_dense() && policy.dense_below_tokens == SparsePolicy::kDenseBelowAuto) {
      policy.dense_below_tokens =
          measure_crossover(*device.impl().backend,
                            {options.max_seqs, model.info().num_q_heads, model.info().num_kv_heads,
                             model.info().head_dim, options.page_size, options.max_context, 0},
                            options.cache_dtype, policy);
    }
    auto made = std::make_unique<Attention>(
        cache, policy,
        AttentionLimits{model.info().num_q_heads, options.max_seqs, options.max_context});
    made->collect_stats(collect, audit);
    return made;
  }

  void make_attention(const SparsePolicy& policy) {
    recordings.clear();
    cache.set_index(policy);
    attentions.resize(1);
    attention = attentions[0].get();
    attentions[0] = attention_of(policy);
    attention = attentions[0].get();
  }

  // Takes `policy` for the next step.
  void turn_to(std::int32_t policy) {
    require(policy >= 0 && policy < static_cast<std::int32_t>(attentions.size()) &&
                attentions[static_cast<std::size_t>(policy)] != nullptr,
            "engine", "policy number, got ", policy, ", accepted 0 or one of add_policy");
    attention = attentions[static_cast<std::size_t>(policy)].get();
  }

  // A decode step's ops, recorded the second time that the same ones are wanted.
  void run_decode_ops(AttentionPort& port, std::int32_t num_seqs) {
    const auto ops = [&] {
      transformer.run_layers(port);
      results.run(0, num_seqs);
    };
    Attention::Impl& impl = attention->impl();
    step_key.assign({policy_number, static_cast<std::int32_t>(results.kind())});
    impl.describe(step_key);
    if (recordings.size() > kMaxRecordings) recordings.clear();
    Recording& recording = recordings[step_key];
    if (recording.steps++ == 1) recording.ops = device.impl().backend->record(ops);
    if (recording.ops == nullptr) {
      ops();
      return;
    }
    recording.ops->replay();
    if (!impl.late_stats()) return;
    for (std::int32_t layer = 0; layer < model.info().num_layers; ++layer) impl.note_stats(layer);
  }

  Status prefill(Sequence& sequence, std::span<const std::int32_t> tokens, std::span<float> logits,
                 const Progress& progress, const LogitsVisitor& visit);
  Status decode(std::span<Sequence* const> sequences, std::span<const std::int32_t> tokens,
                std::span<DecodeRow> rows, std::int32_t policy, bool needs_tokens = false);

  // Logits of all `count` rows of the last forward pass, a few at a time.
  void show_logits(std::int32_t count, std::int64_t first_token, const LogitsVisitor& visit) {
    const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
    constexpr std::int32_t kRows = 16;
    std::vector<float> rows(kRows * vocab);
    for (std::int32_t row = 0; row < count; row += kRows) {
      const std::int32_t some = std::min(kRows, count - row);
      transformer.logits(row, some, {rows.data(), static_cast<std::size_t>(some) * vocab});
      for (std::int32_t i = 0; i < some; ++i) {
        visit(first_token + row + i, {rows.data() + static_cast<std::size_t>(i) * vocab, vocab});
      }
    }
  }

  void add_totals(std::size_t num_seqs) {
    for (std::int32_t layer = 0; layer < model.info().num_layers; ++layer) {
      for (const LayerStats& stats : attention->stats(layer)) totals.add(stats);
    }
    totals.steps += static_cast<std::int64_t>(num_seqs);
  }

  Device device;
  Model model;
  EngineOptions options;
  Transformer transformer;  // first: the cache may take the memory that is left
  RowResults results;
  KvCache cache;
  std::vector<std::unique_ptr<Attention>> attentions;  // by policy number
  Attention* attention = nullptr;                      // of the last step
  std::vector<std::int32_t> chunk;                     // positions of the tokens in flight
  DecodeTotals totals;
  QueryObserver query_observer;
  bool collect = true;
  bool audit = false;
  // Launches of decode steps by what they depend on, where the backend can record them.
  static constexpr std::size_t kMaxRecordings = 64;
  struct Recording {
    std::int32_t steps = 0;
    std::unique_ptr<RecordedOps> ops;
  };
  std::map<std::vector<std::int32_t>, Recording> recordings;
  std::vector<std::int32_t> step_key;
  std::vector<DecodeRow> step_rows;  // of the last step, where the caller has none
  std::int32_t policy_number = 0;    // of the last decode step
};

Engine::Engine(const Device& device, const Model& model, const EngineOptions& options)
    : impl_(std::make_unique<Impl>(device, model, options)) {}
Engine::~Engine() = default;

const Model& Engine::model() const { return impl_->model; }
const Device& Engine::device() const { return impl_->device; }
KvCache& Engine::cache() { return impl_->cache; }
const KvCache& Engine::cache() const { return impl_->cache; }
const EngineOptions& Engine::options() const { return impl_->options; }
const SparsePolicy& Engine::policy() const { return impl_->attentions[0]->policy(); }

void Engine::set_policy(const SparsePolicy& policy) {
  validate_policy(policy);
  impl_->make_attention(policy);
  impl_->options.policy = policy;
}

bool Engine::serves(const SparsePolicy& policy) const {
  validate_policy(policy);
  return impl_->cache.impl().serves(policy);
}

std::int32_t Engine::add_policy(const SparsePolicy& policy) {
  validate_policy(policy);
  auto& all = impl_->attentions;
  auto made = impl_->attention_of(policy);
  auto free = std::find(all.begin(), all.end(), nullptr);
  if (free == all.end()) free = all.insert(all.end(), nullptr);
  *free = std::move(made);
  return static_cast<std::int32_t>(free - all.begin());
}

void Engine::drop_policy(std::int32_t number) {
  require(number != 0, "engine", "policy number, got 0, accepted one of add_policy");
  impl_->turn_to(number);
  impl_->turn_to(0);
  impl_->recordings.clear();
  impl_->attentions[static_cast<std::size_t>(number)] = nullptr;
}

Engine::Status Engine::prefill(Sequence& sequence, std::span<const std::int32_t> tokens,
                               std::span<float> logits, const Progress& progress) {
  return impl_->prefill(sequence, tokens, logits, progress, {});
}

Engine::Status Engine::prefill_scored(Sequence& sequence, std::span<const std::int32_t> tokens,
                                      const LogitsVisitor& visit) {
  return impl_->prefill(sequence, tokens, {}, {}, visit);
}

Engine::Status Engine::Impl::prefill(Sequence& sequence, std::span<const std::int32_t> tokens,
                                     std::span<float> logits, const Progress& progress,
                                     const LogitsVisitor& visit) {
  Impl& im = *this;
  turn_to(0);
  const auto total = static_cast<std::int64_t>(tokens.size());
  require(total >= 1, "prefill", "number of tokens, got 0, accepted 1 or more");
  require(total <= im.options.max_context - sequence.num_tokens(), "prefill", "context, got ",
          sequence.num_tokens() + total, " tokens, accepted up to ", im.options.max_context);
  // What would stop a later chunk stops the first one, so a refusal leaves the sequence as it was.
  im.transformer.check_tokens(tokens);
  require(logits.empty() || logits.size() == static_cast<std::size_t>(im.model.info().vocab_size),
          "prefill", "number of logits, got ", logits.size(), ", accepted 0 or ",
          im.model.info().vocab_size);
  if (sequence.impl().table.pages_needed(static_cast<std::int32_t>(total)) >
      im.cache.free_pages()) {
    return Status::kOutOfPages;
  }
  PrefillPort port(*im.attention, im.options.full_precision);
  Sequence* const batch[] = {&sequence};
  for (std::int64_t done = 0; done < total;) {
    if (progress && !progress(done, total)) return Status::kCancelled;
    const auto count =
        static_cast<std::int32_t>(std::min<std::int64_t>(im.options.prefill_chunk, total - done));
    const std::span<std::int32_t> positions(im.chunk.data(), static_cast<std::size_t>(count));
    std::iota(positions.begin(), positions.end(), sequence.num_tokens());
    if (!im.attention->begin(batch, count)) return Status::kOutOfPages;
    try {
      im.transformer.forward(tokens.subspan(static_cast<std::size_t>(done), positions.size()),
                             positions, port, /*row_invariant=*/false);
    } catch (...) {
      im.attention->rollback();
      throw;
    }
    done += count;
    if (done == total && !logits.empty()) im.transformer.logits(count - 1, 1, logits);
    if (visit) im.show_logits(count, done - count, visit);
  }
  if (progress) (void)progress(total, total);
  return Status::kOk;
}

Engine::Status Engine::decode(std::span<Sequence* const> sequences,
                              std::span<const std::int32_t> tokens, std::span<float> logits,
                              std::int32_t policy) {
  check_batch(sequences, tokens);
  const std::size_t num_logits =
      tokens.size() * static_cast<std::size_t>(impl_->model.info().vocab_size);
  require(logits.size() == num_logits, "decode", "number of logits, got ", logits.size(),
          ", accepted ", num_logits);
  const std::size_t vocab = num_logits / std::max<std::size_t>(tokens.size(), 1);
  impl_->step_rows.assign(tokens.size(), {});
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    impl_->step_rows[i].logits = logits.subspan(i * vocab, vocab);
  }
  return impl_->decode(sequences, tokens, impl_->step_rows, policy);
}

Engine::Status Engine::decode_greedy(std::span<Sequence* const> sequences,
                                     std::span<const std::int32_t> tokens,
                                     std::span<std::int32_t> next, std::int32_t policy) {
  check_batch(sequences, tokens);
  require(next.size() == tokens.size(), "decode", "number of next tokens, got ", next.size(),
          ", accepted ", tokens.size());
  impl_->step_rows.assign(tokens.size(), {.draw = TokenDraw{}});
  const Status status = impl_->decode(sequences, tokens, impl_->step_rows, policy, true);
  if (status != Status::kOk) return status;
  for (std::size_t i = 0; i < next.size(); ++i) next[i] = impl_->step_rows[i].token;
  return status;
}

Engine::Status Engine::decode_rows(std::span<Sequence* const> sequences,
                                   std::span<const std::int32_t> tokens, std::span<DecodeRow> rows,
                                   std::int32_t policy) {
  check_batch(sequences, tokens);
  require(rows.size() == tokens.size(), "decode", "number of rows, got ", rows.size(),
          ", accepted ", tokens.size());
  return impl_->decode(sequences, tokens, rows, policy);
}

Engine::Status Engine::Impl::decode(std::span<Sequence* const> sequences,
                                    std::span<const std::int32_t> tokens,
                                    std::span<DecodeRow> wanted, std::int32_t policy,
                                    bool needs_tokens) {
  turn_to(policy);
  policy_number = policy;
  transformer.check_tokens(tokens);
  results.begin(wanted);
  for (std::size_t i = 0; i < sequences.size() && i < chunk.size(); ++i) {
    chunk[i] = sequences[i]->num_tokens();
  }
  if (!attention->begin(sequences, 1)) return Status::kOutOfPages;
  const auto num_seqs = static_cast<std::int32_t>(sequences.size());
  DecodePort port(*attention, query_observer,
                  tokens.size() * static_cast<std::size_t>(model.info().num_q_heads) *
                      static_cast<std::size_t>(model.info().head_dim));
  const bool launches_alone =
      attention->impl().recordable() && !query_observer && num_seqs <= Transformer::kLogitRows;
  try {
    transformer.prepare(tokens, {chunk.data(), sequences.size()}, /*row_invariant=*/true);
    if (launches_alone) {
      results.upload(0, num_seqs);
      run_decode_ops(port, num_seqs);
    } else {
      transformer.run_layers(port);
    }
    results.take(launches_alone);
    if (needs_tokens) {
      for (const DecodeRow& row : wanted) check_drawn(row.token);
    }
  } catch (...) {
    attention->rollback();
    throw;
  }
  if (collect) add_totals(sequences.size());
  return Status::kOk;
}

void Engine::collect_stats(bool on, bool audit) {
  impl_->collect = on;
  impl_->audit = audit;
  for (const auto& attention : impl_->attentions) {
    if (attention != nullptr) attention->collect_stats(on, audit);
  }
}

std::span<const LayerStats> Engine::last_stats(std::int32_t layer) const {
  return impl_->attention->stats(layer);
}

const DecodeTotals& Engine::totals() const { return impl_->totals; }
void Engine::reset_totals() { impl_->totals = {}; }

void Engine::observe_queries(std::function<void(std::int32_t layer, const float* q)> observer) {
  impl_->query_observer = std::move(observer);
}

}  // namespace twilight
