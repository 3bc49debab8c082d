#include "twilight/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "engine/kv_cache_impl.h"
#include "sparse/decode_step.h"

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

struct Attention::Impl {
  Impl(KvCache& cache_in, const SparsePolicy& policy, const AttentionLimits& limits_in)
      : cache(cache_in.impl()),
        limits(limits_in),
        step(cache.backend(), policy, caps_of(cache.options, limits_in), cache.options.dtype),
        tables(limits.max_seqs,
               (limits.max_tokens + cache.options.page_size - 1) / cache.options.page_size),
        workspace(step.workspace_bytes()) {
    require(covers(cache.storage.options().index, index_format_of(policy)), "attention",
            "the cache lacks the index planes of policy '", policy.name,
            "': make it with that policy or call set_index");
    sequences.reserve(static_cast<std::size_t>(limits.max_seqs));
    old_lengths.reserve(static_cast<std::size_t>(limits.max_seqs));
    table_pointers.reserve(static_cast<std::size_t>(limits.max_seqs));
  }

  [[nodiscard]] PagedKvView view(std::int32_t layer) const {
    PagedKvView kv = cache.storage.view(layer);
    tables.apply(kv);
    return kv;
  }

  KvCache::Impl& cache;
  AttentionLimits limits;
  DecodeStep step;
  BatchTables tables;
  AppendPlan plan;
  Buffer workspace;
  std::vector<Sequence*> sequences;
  std::vector<std::int32_t> old_lengths;
  std::vector<const PageTable*> table_pointers;
  std::int32_t tokens_each = 0;
  bool collect = false;
  bool audit = false;
  std::vector<std::vector<LayerStats>> stats;  // [layer][B]
};

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
  if (!im.plan.copy_to.empty()) {
    for (std::int32_t layer = 0; layer < im.cache.options.num_layers; ++layer) {
      im.cache.backend().copy_pages({im.view(layer), im.cache.storage.index(layer),
                                     im.plan.copy_from.data(), im.plan.copy_to.data(),
                                     static_cast<std::int32_t>(im.plan.copy_to.size())});
    }
  }
  return true;
}

void Attention::append(std::int32_t layer, const float* k, const float* v) {
  Impl& im = *impl_;
  const std::int64_t stride =
      std::int64_t{im.cache.options.num_kv_heads} * im.cache.options.head_dim;
  const PagedKvView kv = im.view(layer);
  im.cache.backend().append_kv({kv, k, v, stride, stride, im.plan.slots.data(),
                                static_cast<std::int32_t>(im.plan.slots.size())});
  if (!im.plan.sealed_pages.empty()) {
    im.cache.backend().seal_pages({kv, im.cache.storage.index(layer), im.plan.sealed_pages.data(),
                                   static_cast<std::int32_t>(im.plan.sealed_pages.size())});
  }
}

void Attention::decode(std::int32_t layer, const float* q, float* out) {
  Impl& im = *impl_;
  require(im.tokens_each == 1, "attention", "decode after begin with tokens_each ", im.tokens_each,
          ", accepted 1");
  const std::int64_t stride = std::int64_t{im.limits.num_q_heads} * im.cache.options.head_dim;
  DecodeStepParams params;
  params.layer = layer;
  params.q = {q, stride, im.limits.num_q_heads};
  params.kv = im.view(layer);
  params.index = im.cache.storage.index(layer);
  params.out = out;
  params.out_seq_stride = stride;
  std::span<LayerStats> stats;
  if (im.collect) {
    auto& entries = im.stats[static_cast<std::size_t>(layer)];
    entries.resize(im.sequences.size());
    stats = entries;
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
}

void Attention::collect_stats(bool on, bool audit) {
  impl_->collect = on;
  impl_->audit = on && audit;
  impl_->stats.resize(static_cast<std::size_t>(impl_->cache.options.num_layers));
}

std::span<const LayerStats> Attention::stats(std::int32_t layer) const {
  if (!impl_->collect) return {};
  return impl_->stats[static_cast<std::size_t>(layer)];
}

}  // namespace twilight
