#ifndef TWILIGHT_KVCACHE_PAGE_TABLE_H_
#define TWILIGHT_KVCACHE_PAGE_TABLE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kvcache/page_pool.h"

namespace twilight {

/// What has to happen to memory for an append: copies first, then writes into `slots`, then
/// sealing. Several sequences may add to one plan. The same page numbers hold in every layer.
struct AppendPlan {
  std::vector<std::int32_t> copy_from;
  std::vector<std::int32_t> copy_to;
  std::vector<std::int64_t> slots;         ///< [T] page * P + offset of each new token, in order
  std::vector<std::int32_t> sealed_pages;  ///< pages that become full

  void clear();
  void reserve(std::size_t tokens);
};

/// The pages of one sequence, the same in every layer. Sealed pages may be shared between
/// sequences; a shared open page is copied before it is written. Move-only; the destructor gives
/// the pages back. Must not outlive its pool. Not thread-safe.
class PageTable {
 public:
  PageTable(PagePool& pool, std::int32_t page_size);
  ~PageTable();
  PageTable(PageTable&& other) noexcept;
  PageTable& operator=(PageTable&& other) noexcept;
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;

  /// Pages `append` would take from the pool for that many tokens.
  [[nodiscard]] std::int32_t pages_needed(std::int32_t num_tokens) const;

  /// Adds room for tokens and what it takes to `plan`. All or nothing: false, with nothing changed,
  /// when the pool has too few pages.
  [[nodiscard]] bool append(std::int32_t num_tokens, AppendPlan& plan);

  /// Forgets the tokens from `num_tokens` on and gives back pages that hold none. A page that was
  /// sealed may become open: its index records mean nothing until it is sealed again.
  void truncate(std::int32_t num_tokens);

  /// A second sequence with the same tokens, sharing every page.
  [[nodiscard]] PageTable fork() const;

  [[nodiscard]] std::int32_t num_tokens() const { return num_tokens_; }
  [[nodiscard]] std::int32_t page_size() const { return page_size_; }
  [[nodiscard]] std::span<const std::int32_t> pages() const { return pages_; }

 private:
  void release_all();

  PagePool* pool_;
  std::int32_t page_size_;
  std::int32_t num_tokens_ = 0;
  std::vector<std::int32_t> pages_;
};

}  // namespace twilight

#endif  // TWILIGHT_KVCACHE_PAGE_TABLE_H_
