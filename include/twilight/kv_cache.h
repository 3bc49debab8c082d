#ifndef TWILIGHT_KV_CACHE_H_
#define TWILIGHT_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <optional>

#include "twilight/device.h"
#include "twilight/export.h"
#include "twilight/policy.h"
#include "twilight/types.h"

namespace twilight {

struct KvCacheOptions {
  std::int32_t num_layers = 0;
  std::int32_t num_kv_heads = 0;  ///< Hkv
  std::int32_t head_dim = 0;      ///< D, up to 512
  std::int32_t page_size = 16;    ///< P, 1 to 256 tokens
  std::int32_t num_pages = 0;     ///< capacity over all sequences
  DType dtype = DType::kBf16;
};

class KvCache;

/// One sequence's tokens in a cache: a list of pages, the same in every layer. Move-only; the
/// destructor gives the pages back. Not thread-safe, and must not outlive its cache.
class TWILIGHT_API Sequence {
 public:
  Sequence(Sequence&&) noexcept;
  Sequence& operator=(Sequence&&) noexcept;
  ~Sequence();

  /// N, tokens written so far.
  [[nodiscard]] std::int32_t num_tokens() const;
  [[nodiscard]] std::int32_t num_pages() const;
  /// Forgets the tokens from `num_tokens` on; throws Error(kInvalidArgument) past the end.
  void truncate(std::int32_t num_tokens);
  /// A second sequence with the same tokens. Shares every page; a page is copied when one of them
  /// writes to it.
  [[nodiscard]] Sequence fork() const;

  struct Impl;
  [[nodiscard]] Impl& impl() const { return *impl_; }

 private:
  friend class KvCache;
  explicit Sequence(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Paged keys and values of many sequences, with the key index that `policy` reads: summaries and
/// low-bit keys, computed page by page as pages fill. Memory is reserved at once and touched as it
/// is first used. Running out of pages is a normal answer of `Attention::begin`, not an error. Not
/// thread-safe.
class TWILIGHT_API KvCache {
 public:
  /// Throws Error(kInvalidArgument) naming the field, Error(kOutOfMemory) where memory cannot be
  /// had.
  KvCache(const Device& device, const KvCacheOptions& options, const SparsePolicy& policy);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  [[nodiscard]] Sequence new_sequence();
  /// A sequence with the same tokens in pages of its own, index included; shares nothing. Empty,
  /// with nothing changed, when the cache is out of pages.
  [[nodiscard]] std::optional<Sequence> copy(const Sequence& sequence);
  [[nodiscard]] const KvCacheOptions& options() const;
  [[nodiscard]] std::int32_t free_pages() const;
  /// Bytes of one page over all layers, index included.
  [[nodiscard]] std::int64_t bytes_per_page() const;

  /// Replaces the index by the one `policy` reads, recomputed from the keys of every page in use.
  /// Does nothing where the planes are the same. `Attention` objects must be made anew afterwards.
  void set_index(const SparsePolicy& policy);

  /// Copies a sequence's keys and values of a layer out as f32, [N, Hkv, D] each. Throws
  /// Error(kInvalidArgument) for a layer the cache does not have.
  void read(const Sequence& sequence, std::int32_t layer, float* k, float* v) const;

  struct Impl;
  [[nodiscard]] Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace twilight

#endif  // TWILIGHT_KV_CACHE_H_
