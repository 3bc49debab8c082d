#ifndef TWILIGHT_ENGINE_ATTENTION_IMPL_H_
#define TWILIGHT_ENGINE_ATTENTION_IMPL_H_

#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "core/device_memory.h"
#include "engine/kv_cache_impl.h"
#include "sparse/decode_step.h"
#include "twilight/attention.h"

namespace twilight {

struct Attention::Impl {
  Impl(KvCache& cache_in, const SparsePolicy& policy, const AttentionLimits& limits_in);

  [[nodiscard]] PagedKvView view(std::int32_t layer) const {
    PagedKvView kv = cache.storage.view(layer);
    tables.apply(kv);
    return kv;
  }
  /// What appends the new tokens' keys and values to a layer, rows packed.
  [[nodiscard]] AppendKvParams append_params(std::int32_t layer, const float* k,
                                             const float* v) const;
  /// Seals a layer's pages that the new tokens filled, once they are appended.
  void seal(std::int32_t layer);
  /// All but the buffers of q and out.
  [[nodiscard]] DecodeStepParams step_params(std::int32_t layer) const;
  /// Puts the plan where ops read it.
  void send_plan();
  /// Room for the plan of that many tokens in device memory.
  void reserve_words(std::int64_t tokens);
  /// Whether statistics stay on the device until somebody asks: one download a step.
  [[nodiscard]] bool late_stats() const { return collect && !audit && !memory.is_host(); }
  [[nodiscard]] std::size_t list_bytes() const { return step.lists_bytes(); }
  /// Notes that statistics of a layer are on the device.
  void note_stats(std::int32_t layer);
  /// Everything that a step's launches depend on apart from the contents of device memory.
  void describe(std::vector<std::int32_t>& key) const;
  /// Whether a step is launches alone.
  [[nodiscard]] bool recordable() const {
    return !memory.is_host() && !(collect && audit) && step.policy().selector != "oracle";
  }
  /// Reads what is still on the device.
  void settle_stats();

  KvCache::Impl& cache;
  DeviceMemory& memory;
  AttentionLimits limits;
  DecodeStep step;
  BatchTables tables;
  AppendPlan plan;
  DeviceBuffer workspace;
  // The plan as ops read it: the host's own, or slices of `words`.
  DeviceBuffer words;
  std::int64_t word_tokens = 0;
  const std::int64_t* slots = nullptr;
  const std::int32_t* sealed = nullptr;
  const std::int32_t* copy_from = nullptr;
  const std::int32_t* copy_to = nullptr;
  /// Changes when recorded launches no longer hold.
  std::int32_t generation = 0;
  std::vector<Sequence*> sequences;
  std::vector<std::int32_t> old_lengths;
  std::vector<const PageTable*> table_pointers;
  std::int32_t tokens_each = 0;
  bool collect = false;
  bool audit = false;
  std::vector<std::vector<LayerStats>> stats;  // [layer][B]
  DeviceBuffer lists;                          // [layer] what statistics read
  Buffer host_lists;
  std::vector<bool> pending;  // [layer] its statistics are still on the device
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_ATTENTION_IMPL_H_
