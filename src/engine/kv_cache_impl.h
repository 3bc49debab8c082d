#ifndef TWILIGHT_ENGINE_KV_CACHE_IMPL_H_
#define TWILIGHT_ENGINE_KV_CACHE_IMPL_H_

#include <algorithm>
#include <utility>

#include "engine/device_impl.h"
#include "kvcache/kv_storage.h"
#include "kvcache/page_table.h"
#include "sparse/decode_step.h"
#include "twilight/kv_cache.h"

namespace twilight {

struct Sequence::Impl {
  PageTable table;
};

/// Whether an index in format `have` serves a policy that needs `need`.
[[nodiscard]] inline bool covers(const IndexFormat& have, const IndexFormat& need) {
  return (need.summary == SummaryKind::kNone ||
          (need.summary == have.summary && need.label_channels == have.label_channels)) &&
         (need.key_bits == 0 ||
          (need.key_bits == have.key_bits && need.own_centre() == have.own_centre())) &&
         (need.value_bits == 0 || need.value_bits == have.value_bits) && need.layout == have.layout;
}

struct KvCache::Impl {
  Impl(const Device& device_in, const KvCacheOptions& options_in,
       const KvStorageOptions& storage_in)
      : device(device_in),
        options(options_in),
        storage(storage_in, device.impl().backend->memory()),
        pool(storage_in.num_pages) {}

  [[nodiscard]] Backend& backend() const { return *device.impl().backend; }
  /// The index planes a policy reads, as the backend orders them.
  [[nodiscard]] IndexFormat format_of(const SparsePolicy& policy) const {
    return index_format_of(policy, backend(), options.head_dim);
  }

  /// Whether the index serves a policy as it is, label channels included.
  [[nodiscard]] bool serves(const SparsePolicy& policy) const {
    const IndexFormat need = format_of(policy);
    return covers(storage.options().index, need) &&
           (need.summary != SummaryKind::kLabels ||
            std::ranges::equal(storage.labels(), policy.labels));
  }

  Device device;
  KvCacheOptions options;
  KvStorage storage;
  PagePool pool;
};

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_KV_CACHE_IMPL_H_
