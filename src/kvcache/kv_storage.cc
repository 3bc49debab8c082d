#include "kvcache/kv_storage.h"

#include <algorithm>
#include <limits>

#include "core/check.h"

namespace twilight {
namespace {

std::int64_t plane_bytes(const KvStorageOptions& options) {
  return std::int64_t{options.num_kv_heads} * options.page_size * options.head_dim *
         dtype_bytes(options.dtype);
}

// Records start on 16-byte boundaries whatever their length.
std::int64_t record_stride(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

std::int64_t summary_stride(const KvStorageOptions& options) {
  return record_stride(summary_record_bytes(options.index, options.page_size, options.head_dim));
}

std::int64_t estimate_stride(const KvStorageOptions& options) {
  return record_stride(estimate_record_bytes(options.index, options.page_size, options.head_dim));
}

std::int64_t value_stride(const KvStorageOptions& options) {
  return options.index.value_bits == 0 ? 0 : record_stride(nibble_bytes(options.head_dim));
}

std::int64_t params_stride(const KvStorageOptions& options) {
  return options.index.has_params() ? static_cast<std::int64_t>(sizeof(PageParams)) : 0;
}

}  // namespace

std::int64_t KvStorageOptions::bytes_per_page() const {
  return num_layers *
         (2 * plane_bytes(*this) + num_kv_heads * (summary_stride(*this) + estimate_stride(*this) +
                                                   value_stride(*this) + params_stride(*this)));
}

KvStorage::KvStorage(const KvStorageOptions& options, DeviceMemory& memory)
    : options_(options), memory_(&memory) {
  const auto positive = [](const char* name, std::int32_t value, std::int32_t max) {
    require(value >= 1 && value <= max, "kv_cache", name, ", got ", value, ", accepted 1 to ", max);
  };
  positive("num_layers", options.num_layers, 4096);
  positive("num_kv_heads", options.num_kv_heads, 4096);
  positive("head_dim", options.head_dim, 512);
  positive("page_size", options.page_size, 256);
  positive("num_pages", options.num_pages, std::numeric_limits<std::int32_t>::max() / 256);
  const std::int32_t bits = options.index.key_bits;
  require(bits == 0 || bits == 2 || bits == 4 || bits == 8, "kv_cache", "key_bits, got ", bits,
          ", accepted 0, 2, 4, 8");
  layers_.resize(static_cast<std::size_t>(options.num_layers));
  const auto bytes = static_cast<std::size_t>(plane_bytes(options) * options.num_pages);
  for (Layer& layer : layers_) {
    layer.k = DeviceBuffer(memory, bytes);
    layer.v = DeviceBuffer(memory, bytes);
  }
  make_index_planes();
}

void KvStorage::make_index_planes() {
  const auto pool = [&](std::int64_t record_bytes) {
    return DeviceBuffer(*memory_, static_cast<std::size_t>(record_bytes * options_.num_kv_heads *
                                                           options_.num_pages));
  };
  for (Layer& layer : layers_) {
    // Free first: old and new planes need not fit together.
    layer.summaries = {};
    layer.estimates = {};
    layer.value_means = {};
    layer.params = {};
    layer.summaries = pool(summary_stride(options_));
    layer.estimates = pool(estimate_stride(options_));
    layer.value_means = pool(value_stride(options_));
    layer.params = pool(params_stride(options_));
  }
}

void KvStorage::check_labels(const IndexFormat& format,
                             std::span<const std::int32_t> labels) const {
  if (format.summary != SummaryKind::kLabels) return;
  const std::int64_t count =
      std::int64_t{options_.num_layers} * options_.num_kv_heads * format.label_channels;
  require(std::ssize(labels) == count, "kv_cache", "labels, got ", labels.size(),
          " channels, accepted ", count, " for ", options_.num_layers, " layers of ",
          options_.num_kv_heads, " KV heads");
  for (const std::int32_t channel : labels) {
    require(channel >= 0 && channel < options_.head_dim, "kv_cache", "labels, got channel ",
            channel, ", accepted 0 to ", options_.head_dim - 1);
  }
}

void KvStorage::set_labels(std::span<const std::int32_t> labels) {
  check_labels(options_.index, labels);
  labels_.assign(labels.begin(), labels.end());
}

void KvStorage::set_index_format(const IndexFormat& format, std::span<const std::int32_t> labels) {
  check_labels(format, labels);
  options_.index = format;
  labels_.assign(labels.begin(), labels.end());
  make_index_planes();
}

PagedKvView KvStorage::view(std::int32_t layer) const {
  TWILIGHT_DCHECK(layer >= 0 && layer < options_.num_layers);
  const Layer& pools = layers_[static_cast<std::size_t>(layer)];
  const std::int64_t row = options_.head_dim;
  const std::int64_t page = row * options_.page_size;
  const std::int64_t head = page * options_.num_pages;
  PagedKvView view;
  view.dtype = options_.dtype;
  view.num_kv_heads = options_.num_kv_heads;
  view.head_dim = options_.head_dim;
  view.page_size = options_.page_size;
  view.k = {pools.k.data(), page, head, row};
  view.v = {pools.v.data(), page, head, row};
  return view;
}

KeyIndexView KvStorage::index(std::int32_t layer) const {
  TWILIGHT_DCHECK(layer >= 0 && layer < options_.num_layers);
  const Layer& pools = layers_[static_cast<std::size_t>(layer)];
  KeyIndexView view;
  view.format = options_.index;
  view.summaries = pools.summaries.data();
  view.summary_page_stride = summary_stride(options_);
  view.summary_head_stride = view.summary_page_stride * options_.num_pages;
  view.estimates = pools.estimates.data();
  view.estimate_page_stride = estimate_stride(options_);
  view.estimate_head_stride = view.estimate_page_stride * options_.num_pages;
  view.value_means = pools.value_means.data();
  view.value_page_stride = value_stride(options_);
  view.value_head_stride = view.value_page_stride * options_.num_pages;
  view.params = pools.params.data();
  // Page by page for a GPU, which reads 32 bytes at least, two records, and whose blocks walk the
  // heads of a page together.
  const bool by_page = options_.index.layout == IndexLayout::kMma;
  view.params_page_stride = params_stride(options_) * (by_page ? options_.num_kv_heads : 1);
  view.params_head_stride = params_stride(options_) * (by_page ? 1 : options_.num_pages);
  if (options_.index.summary == SummaryKind::kLabels && !labels_.empty()) {
    view.labels = labels_.data() +
                  std::int64_t{layer} * options_.num_kv_heads * options_.index.label_channels;
  }
  return view;
}

BatchTables::BatchTables(std::int32_t max_seqs, std::int32_t max_pages_per_seq,
                         DeviceMemory& memory)
    : memory_(&memory), max_pages_(max_pages_per_seq) {
  block_table_.resize(static_cast<std::size_t>(max_seqs) * static_cast<std::size_t>(max_pages_));
  seq_lens_.resize(static_cast<std::size_t>(max_seqs));
  if (memory.is_host()) return;
  device_table_ = DeviceBuffer(memory, block_table_.size() * sizeof(std::int32_t));
  device_lens_ = DeviceBuffer(memory, seq_lens_.size() * sizeof(std::int32_t));
}

void BatchTables::set(std::span<const PageTable* const> sequences) {
  require(sequences.size() <= seq_lens_.size(), "batch", "number of sequences, got ",
          sequences.size(), ", accepted up to ", seq_lens_.size());
  num_seqs_ = static_cast<std::int32_t>(sequences.size());
  for (std::size_t seq = 0; seq < sequences.size(); ++seq) {
    const auto pages = sequences[seq]->pages();
    require(pages.size() <= static_cast<std::size_t>(max_pages_), "batch", "sequence length, got ",
            sequences[seq]->num_tokens(), " tokens, accepted up to ",
            std::int64_t{max_pages_} * sequences[seq]->page_size());
    seq_lens_[seq] = sequences[seq]->num_tokens();
    const std::size_t row = seq * static_cast<std::size_t>(max_pages_);
    const auto known = block_table_.begin() + static_cast<std::ptrdiff_t>(row);
    const auto [page, old] = std::mismatch(pages.begin(), pages.end(), known);
    std::copy(page, pages.end(), old);
    if (memory_->is_host() || page == pages.end()) continue;
    const auto first = static_cast<std::size_t>(page - pages.begin());
    memory_->upload(device_table_.as<std::int32_t>() + row + first, &*page,
                    (pages.size() - first) * sizeof(std::int32_t));
  }
  if (!memory_->is_host()) {
    memory_->upload(device_lens_.data(), seq_lens_.data(), sequences.size() * sizeof(std::int32_t));
  }
}

void BatchTables::apply(PagedKvView& view) const {
  view.num_seqs = num_seqs_;
  view.block_table_stride = max_pages_;
  if (memory_->is_host()) {
    view.block_table = block_table_.data();
    view.seq_lens = seq_lens_.data();
    return;
  }
  view.block_table = device_table_.as<std::int32_t>();
  view.seq_lens = device_lens_.as<std::int32_t>();
  view.host_seq_lens = seq_lens_.data();
}

}  // namespace twilight
