#ifndef TWILIGHT_KVCACHE_KV_STORAGE_H_
#define TWILIGHT_KVCACHE_KV_STORAGE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/device_memory.h"
#include "kvcache/page_table.h"
#include "kvcache/paged_kv_view.h"
#include "quant/index_format.h"

namespace twilight {

struct KvStorageOptions {
  std::int32_t num_layers = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t page_size = 16;
  std::int32_t num_pages = 0;
  DType dtype = DType::kBf16;
  IndexFormat index;

  /// Bytes of one page over all layers, index included.
  [[nodiscard]] std::int64_t bytes_per_page() const;
};

/// Memory of a paged cache, on the host or a device: per layer one pool of K, of V and of each
/// index plane, laid out [KV head][page][slot][D] (K, V) and [KV head][page][record], so that one
/// head's pages, in the order they were allocated, are one stream. Memory is reserved at once and
/// touched as pages are first written. Owns memory, launches nothing.
class KvStorage {
 public:
  explicit KvStorage(const KvStorageOptions& options, DeviceMemory& memory = host_memory());

  [[nodiscard]] const KvStorageOptions& options() const { return options_; }
  /// The pools of a layer, with no sequences in it yet: set block_table, seq_lens and num_seqs.
  [[nodiscard]] PagedKvView view(std::int32_t layer) const;
  [[nodiscard]] KeyIndexView index(std::int32_t layer) const;
  /// Replaces the index planes by empty ones of another format; records must be computed anew.
  /// `labels` as in set_labels; where they are refused nothing has changed.
  void set_index_format(const IndexFormat& format, std::span<const std::int32_t> labels = {});
  /// The channels of kLabels summaries, [layers, Hkv, label_channels]; before pages are sealed.
  /// Throws Error(kInvalidArgument) where their number or one of them does not fit.
  void set_labels(std::span<const std::int32_t> labels);
  [[nodiscard]] std::span<const std::int32_t> labels() const { return labels_; }

 private:
  void make_index_planes();
  void check_labels(const IndexFormat& format, std::span<const std::int32_t> labels) const;

  struct Layer {
    DeviceBuffer k, v, summaries, estimates, value_means, params;
  };
  KvStorageOptions options_;
  DeviceMemory* memory_;
  std::vector<std::int32_t> labels_;
  std::vector<Layer> layers_;
};

/// The block table and lengths of the sequences of one batch, as kernels read them: in host memory
/// and, where that is another, in the device's. Allocates nothing after construction.
class BatchTables {
 public:
  BatchTables(std::int32_t max_seqs, std::int32_t max_pages_per_seq,
              DeviceMemory& memory = host_memory());

  /// Takes over the present pages and lengths of the sequences, in order; to a device goes what
  /// differs from the last call.
  void set(std::span<const PageTable* const> sequences);
  /// Points `view` at these tables.
  void apply(PagedKvView& view) const;

 private:
  DeviceMemory* memory_;
  std::int32_t max_pages_;
  DeviceBuffer device_table_;  // both empty on the host
  DeviceBuffer device_lens_;
  std::vector<std::int32_t> block_table_;
  std::vector<std::int32_t> seq_lens_;
  std::int32_t num_seqs_ = 0;
};

}  // namespace twilight

#endif  // TWILIGHT_KVCACHE_KV_STORAGE_H_
