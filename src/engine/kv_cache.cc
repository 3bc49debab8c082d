#include "twilight/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/float16.h"
#include "engine/kv_cache_impl.h"
#include "sparse/decode_step.h"

namespace twilight {
namespace {

void widen(const std::byte* row, DType dtype, std::int32_t count, float* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, row, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (std::int32_t d = 0; d < count; ++d) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, row + d * 2, sizeof(bits));
    out[d] = dtype == DType::kBf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  }
}

}  // namespace

Sequence::Sequence(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Sequence::Sequence(Sequence&&) noexcept = default;
Sequence& Sequence::operator=(Sequence&&) noexcept = default;
Sequence::~Sequence() = default;

std::int32_t Sequence::num_tokens() const { return impl_->table.num_tokens(); }
std::int32_t Sequence::num_pages() const {
  return static_cast<std::int32_t>(impl_->table.pages().size());
}
void Sequence::truncate(std::int32_t num_tokens) { impl_->table.truncate(num_tokens); }
Sequence Sequence::fork() const {
  return Sequence(std::make_unique<Impl>(Impl{impl_->table.fork()}));
}

KvCache::KvCache(const Device& device, const KvCacheOptions& options, const SparsePolicy& policy) {
  validate_policy(policy);
  KvStorageOptions storage;
  storage.num_layers = options.num_layers;
  storage.num_kv_heads = options.num_kv_heads;
  storage.head_dim = options.head_dim;
  storage.page_size = options.page_size;
  storage.num_pages = options.num_pages;
  storage.dtype = options.dtype;
  storage.index = index_format_of(policy, *device.impl().backend, options.head_dim);
  impl_ = std::make_unique<Impl>(device, options, storage);
  if (storage.index.summary == SummaryKind::kLabels) impl_->storage.set_labels(policy.labels);
}

KvCache::~KvCache() = default;

Sequence KvCache::new_sequence() {
  return Sequence(std::make_unique<Sequence::Impl>(
      Sequence::Impl{PageTable(impl_->pool, impl_->options.page_size)}));
}

std::optional<Sequence> KvCache::copy(const Sequence& sequence) {
  const PageTable& from = sequence.impl().table;
  Sequence out = new_sequence();
  AppendPlan plan;
  if (!out.impl().table.append(from.num_tokens(), plan)) return std::nullopt;
  const auto to = out.impl().table.pages();
  if (to.empty()) return out;
  DeviceMemory& memory = impl_->backend().memory();
  CopyPagesParams copy;
  copy.from = from.pages().data();
  copy.to = to.data();
  copy.num_pages = static_cast<std::int32_t>(to.size());
  copy.any_order = true;
  DeviceBuffer lists;
  if (!memory.is_host()) {
    lists = DeviceBuffer(memory, 2 * to.size_bytes());
    auto* const pages = lists.as<std::int32_t>();
    memory.upload(pages, copy.from, to.size_bytes());
    memory.upload(pages + to.size(), copy.to, to.size_bytes());
    copy.from = pages;
    copy.to = pages + to.size();
  }
  for (std::int32_t layer = 0; layer < impl_->options.num_layers; ++layer) {
    copy.kv = impl_->storage.view(layer);
    copy.index = impl_->storage.index(layer);
    impl_->backend().copy_pages(copy);
  }
  memory.synchronize();
  return out;
}

const KvCacheOptions& KvCache::options() const { return impl_->options; }
std::int32_t KvCache::free_pages() const { return impl_->pool.free_pages(); }
std::int64_t KvCache::bytes_per_page() const { return impl_->storage.options().bytes_per_page(); }

void KvCache::set_index(const SparsePolicy& policy) {
  validate_policy(policy);
  if (impl_->serves(policy)) return;
  const IndexFormat have = impl_->storage.options().index;
  IndexFormat need = impl_->format_of(policy);
  const bool with_labels = need.summary == SummaryKind::kLabels;
  if (need.summary == SummaryKind::kNone) {
    need.summary = have.summary;
    need.label_channels = have.label_channels;
  }
  if (need.key_bits == 0) need.key_bits = have.key_bits;
  if (need.value_bits == 0) need.value_bits = have.value_bits;
  std::vector<std::int32_t> labels = policy.labels;
  if (!with_labels) labels.assign(impl_->storage.labels().begin(), impl_->storage.labels().end());
  impl_->storage.set_index_format(need, labels);

  // Open pages get a record too; it means nothing and is overwritten when they are sealed.
  std::vector<std::int32_t> used;
  for (std::int32_t page = 0; page < impl_->pool.num_pages(); ++page) {
    if (impl_->pool.ref_count(page) > 0) used.push_back(page);
  }
  if (used.empty()) return;
  DeviceMemory& memory = impl_->backend().memory();
  DeviceBuffer pages;
  if (!memory.is_host()) {
    pages = DeviceBuffer(memory, used.size() * sizeof(std::int32_t));
    memory.upload(pages.data(), used.data(), pages.size());
  }
  for (std::int32_t layer = 0; layer < impl_->options.num_layers; ++layer) {
    SealPagesParams seal;
    seal.kv = impl_->storage.view(layer);
    seal.index = impl_->storage.index(layer);
    seal.pages = memory.is_host() ? used.data() : pages.as<std::int32_t>();
    seal.num_pages = static_cast<std::int32_t>(used.size());
    impl_->backend().seal_pages(seal);
  }
}

void KvCache::read(const Sequence& sequence, std::int32_t layer, float* k, float* v) const {
  const KvCacheOptions& options = impl_->options;
  require(layer >= 0 && layer < options.num_layers, "kv_cache", "layer, got ", layer,
          ", accepted 0 to ", options.num_layers - 1);
  const PagedKvView view = impl_->storage.view(layer);
  const PageTable& table = sequence.impl().table;
  const std::int64_t head_dim = options.head_dim;
  DeviceMemory& memory = impl_->backend().memory();
  const int bytes = dtype_bytes(options.dtype);
  const auto page_bytes = static_cast<std::size_t>(head_dim * options.page_size * bytes);
  std::vector<std::byte> copy(memory.is_host() ? 0 : page_bytes);
  // Rows of a page and head follow each other.
  const auto read_rows = [&](const std::byte* rows, std::int64_t first, std::int64_t head,
                             float* out) {
    const std::int64_t count =
        std::min<std::int64_t>(options.page_size, table.num_tokens() - first);
    if (!memory.is_host()) {
      memory.download(copy.data(), rows, static_cast<std::size_t>(count * head_dim * bytes));
      rows = copy.data();
    }
    for (std::int64_t slot = 0; slot < count; ++slot) {
      widen(rows + slot * head_dim * bytes, options.dtype, options.head_dim,
            out + ((first + slot) * options.num_kv_heads + head) * head_dim);
    }
  };
  std::int64_t first = 0;
  for (const std::int32_t page : table.pages()) {
    for (std::int64_t head = 0; head < options.num_kv_heads; ++head) {
      read_rows(view.k_rows(page, head), first, head, k);
      read_rows(view.v_rows(page, head), first, head, v);
    }
    first += options.page_size;
  }
}

}  // namespace twilight
