#include "twilight/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "core/device_memory.h"
#include "engine/attention_impl.h"

namespace twilight {
namespace {

StepCaps caps_of(const KvCacheOptions& cache, const AttentionLimits& limits) {
  StepCaps caps;
  caps.max_seqs = limits.max_seqs;
  caps.num_q_heads = limits.num_q_heads;
  caps.num_kv_heads = cache.num_kv_heads;
  caps.head_dim = cache.head_dim;
  caps.page_size = cache.page_size;
  caps.max_tokens = limits.max_tokens;
  return caps;
}

}  // namespace

Attention::Impl::Impl(KvCache& cache_in, const SparsePolicy& policy,
                      const AttentionLimits& limits_in)
    : cache(cache_in.impl()),
      memory(cache.backend().memory()),
      limits(limits_in),
      step(cache.backend(), policy, caps_of(cache.options, limits_in), cache.options.dtype),
      tables(limits.max_seqs,
             (limits.max_tokens + cache.options.page_size - 1) / cache.options.page_size, memory),
      workspace(memory, step.workspace_bytes()) {
  require(cache.serves(policy), "attention",
          "the cache lacks the index planes (or label channels) of policy '", policy.name,
          "': make it with that policy or call set_index");
  sequences.reserve(static_cast<std::size_t>(limits.max_seqs));
  old_lengths.reserve(static_cast<std::size_t>(limits.max_seqs));
  table_pointers.reserve(static_cast<std::size_t>(limits.max_seqs));
  pending.resize(static_cast<std::size_t>(cache.options.num_layers));
  if (!memory.is_host()) reserve_words(limits.max_seqs);
}

void Attention::Impl::reserve_words(std::int64_t tokens) {
  if (tokens <= word_tokens) return;
  word_tokens = tokens;
  // One of each a token at most, slots first.
  words = {};
  words = DeviceBuffer(
      memory, static_cast<std::size_t>(tokens) * (sizeof(std::int64_t) + 3 * sizeof(std::int32_t)));
  ++generation;
}

void Attention::Impl::send_plan() {
  if (memory.is_host()) {
    slots = plan.slots.data();
    sealed = plan.sealed_pages.data();
    copy_from = plan.copy_from.data();
    copy_to = plan.copy_to.data();
    return;
  }
  reserve_words(static_cast<std::int64_t>(plan.slots.size()));
  auto* const slot_words = words.as<std::int64_t>();
  auto* const page_words = reinterpret_cast<std::int32_t*>(slot_words + word_tokens);
  const auto send = [&](const std::vector<std::int32_t>& pages, std::int32_t* to) {
    memory.upload(to, pages.data(), pages.size() * sizeof(std::int32_t));
    return to;
  };
  memory.upload(slot_words, plan.slots.data(), plan.slots.size() * sizeof(std::int64_t));
  slots = slot_words;
  sealed = send(plan.sealed_pages, page_words);
  copy_from = send(plan.copy_from, page_words + word_tokens);
  copy_to = send(plan.copy_to, page_words + 2 * word_tokens);
}

DecodeStepParams Attention::Impl::step_params(std::int32_t layer) const {
  const std::int64_t stride = std::int64_t{limits.num_q_heads} * cache.options.head_dim;
  DecodeStepParams params;
  params.layer = layer;
  params.q.seq_stride = stride;
  params.q.num_heads = limits.num_q_heads;
  params.kv = view(layer);
  params.index = cache.storage.index(layer);
  params.out_seq_stride = stride;
  if (late_stats()) params.lists = lists.data() + static_cast<std::size_t>(layer) * list_bytes();
  return params;
}

void Attention::Impl::note_stats(std::int32_t layer) {
  stats[static_cast<std::size_t>(layer)].resize(sequences.size());
  pending[static_cast<std::size_t>(layer)] = true;
}

void Attention::Impl::describe(std::vector<std::int32_t>& key) const {
  key.push_back(generation);
  key.push_back(collect ? 1 : 0);
  key.push_back(static_cast<std::int32_t>(sequences.size()));
  key.push_back(static_cast<std::int32_t>(plan.sealed_pages.size()));
  for (std::int32_t layer = 0; layer < cache.options.num_layers; ++layer) {
    const float p = step.policy().p_of_layer(layer);
    for (const PageTable* table : table_pointers) {
      key.push_back(static_cast<std::int32_t>(step.path_of(layer, table->num_tokens(), p)));
    }
  }
}

void Attention::Impl::settle_stats() {
  if (std::find(pending.begin(), pending.end(), true) == pending.end()) return;
  memory.download(host_lists.data(), lists.data(), lists.size());
  for (std::size_t layer = 0; layer < pending.size(); ++layer) {
    if (!pending[layer]) continue;
    pending[layer] = false;
    step.read_stats(step_params(static_cast<std::int32_t>(layer)),
                    host_lists.data() + layer * list_bytes(), stats[layer]);
  }
}

Attention::Attention(KvCache& cache, const SparsePolicy& policy, const AttentionLimits& limits)
    : impl_(std::make_unique<Impl>(cache, policy, limits)) {}
Attention::~Attention() = default;

const SparsePolicy& Attention::policy() const { return impl_->step.policy(); }

bool Attention::begin(std::span<Sequence* const> sequences, std::int32_t tokens_each) {
  Impl& im = *impl_;
  require(!sequences.empty() && sequences.size() <= static_cast<std::size_t>(im.limits.max_seqs),
          "attention", "number of sequences, got ", sequences.size(), ", accepted 1 to ",
          im.limits.max_seqs);
  require(tokens_each >= 1, "attention", "tokens per sequence, got ", tokens_each,
          ", accepted 1 or more");
  std::int64_t needed = 0;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const PageTable& table = sequences[i]->impl().table;
    require(std::find(sequences.begin(), sequences.begin() + static_cast<std::ptrdiff_t>(i),
                      sequences[i]) == sequences.begin() + static_cast<std::ptrdiff_t>(i),
            "attention", "sequence ", i, " is in the batch twice");
    require(tokens_each <= im.limits.max_tokens - table.num_tokens(), "attention",
            "sequence length, got ", std::int64_t{table.num_tokens()} + tokens_each,
            " tokens, accepted up to ", im.limits.max_tokens);
    needed += table.pages_needed(tokens_each);
  }
  if (needed > im.cache.pool.free_pages()) return false;

  im.settle_stats();
  im.plan.clear();
  im.sequences.assign(sequences.begin(), sequences.end());
  im.old_lengths.clear();
  im.table_pointers.clear();
  im.tokens_each = tokens_each;
  for (Sequence* sequence : sequences) {
    PageTable& table = sequence->impl().table;
    im.old_lengths.push_back(table.num_tokens());
    const bool fits = table.append(tokens_each, im.plan);
    TWILIGHT_DCHECK(fits);
    (void)fits;
    im.table_pointers.push_back(&table);
  }
  im.tables.set(im.table_pointers);
  im.send_plan();
  if (!im.plan.copy_to.empty()) {
    for (std::int32_t layer = 0; layer < im.cache.options.num_layers; ++layer) {
      im.cache.backend().copy_pages({im.view(layer), im.cache.storage.index(layer), im.copy_from,
                                     im.copy_to,
                                     static_cast<std::int32_t>(im.plan.copy_to.size())});
    }
  }
  return true;
}

AppendKvParams Attention::Impl::append_params(std::int32_t layer, const float* k,
                                              const float* v) const {
  const std::int64_t stride = std::int64_t{cache.options.num_kv_heads} * cache.options.head_dim;
  return {view(layer), k, v, stride, stride, slots, static_cast<std::int32_t>(plan.slots.size())};
}

void Attention::Impl::seal(std::int32_t layer) {
  if (plan.sealed_pages.empty()) return;
  cache.backend().seal_pages({view(layer), cache.storage.index(layer), sealed,
                              static_cast<std::int32_t>(plan.sealed_pages.size())});
}

void Attention::append(std::int32_t layer, const float* k, const float* v) {
  impl_->cache.backend().append_kv(impl_->append_params(layer, k, v));
  impl_->seal(layer);
}

void Attention::decode(std::int32_t layer, const float* q, float* out) {
  Impl& im = *impl_;
  require(im.tokens_each == 1, "attention", "decode after begin with tokens_each ", im.tokens_each,
          ", accepted 1");
  DecodeStepParams params = im.step_params(layer);
  params.q.data = q;
  params.out = out;
  std::span<LayerStats> stats;
  if (im.collect) {
    if (im.late_stats()) {
      im.note_stats(layer);
    } else {
      auto& entries = im.stats[static_cast<std::size_t>(layer)];
      entries.resize(im.sequences.size());
      stats = entries;
    }
  }
  im.step.run(params, {im.workspace.data(), im.workspace.size()}, stats, im.audit);
}

void Attention::prefill(std::int32_t layer, const float* q, float* out, bool full_precision) {
  Impl& im = *impl_;
  require(im.sequences.size() == 1, "attention", "prefill with ", im.sequences.size(),
          " sequences, accepted 1");
  const std::int64_t stride = std::int64_t{im.limits.num_q_heads} * im.cache.options.head_dim;
  AttendPrefillParams params;
  params.q = q;
  params.q_token_stride = stride;
  params.num_q_heads = im.limits.num_q_heads;
  params.num_tokens = im.tokens_each;
  params.kv = im.view(layer);
  params.scale = 1.0F / std::sqrt(static_cast<float>(im.cache.options.head_dim));
  params.out = out;
  params.out_token_stride = stride;
  params.full_precision = full_precision;
  im.cache.backend().attend_prefill(params);
}

void Attention::rollback() {
  Impl& im = *impl_;
  for (std::size_t i = 0; i < im.sequences.size(); ++i) {
    im.sequences[i]->impl().table.truncate(im.old_lengths[i]);
  }
  im.sequences.clear();
  im.old_lengths.clear();
  im.pending.assign(im.pending.size(), false);
}

void Attention::collect_stats(bool on, bool audit) {
  Impl& im = *impl_;
  im.settle_stats();
  im.collect = on;
  im.audit = on && audit;
  im.stats.resize(static_cast<std::size_t>(im.cache.options.num_layers));
  if (!im.late_stats() || im.lists.size() > 0) return;
  ++im.generation;
  im.lists = DeviceBuffer(im.memory, im.stats.size() * im.list_bytes());
  im.host_lists = Buffer(im.lists.size());
}

std::span<const LayerStats> Attention::stats(std::int32_t layer) const {
  if (!impl_->collect) return {};
  impl_->settle_stats();
  return impl_->stats[static_cast<std::size_t>(layer)];
}

}  // namespace twilight
