#ifndef TWILIGHT_KVCACHE_PAGE_POOL_H_
#define TWILIGHT_KVCACHE_PAGE_POOL_H_

#include <cstdint>
#include <optional>
#include <vector>

namespace twilight {

/// Reference-counted physical page numbers 0 .. num_pages - 1. Knows nothing of memory. Allocates
/// nothing after construction. Not thread-safe.
class PagePool {
 public:
  explicit PagePool(std::int32_t num_pages);

  /// A page with one reference, the lowest number never used or the one freed last; empty when the
  /// pool is exhausted, which is a normal answer.
  [[nodiscard]] std::optional<std::int32_t> allocate();
  void retain(std::int32_t page);
  void release(std::int32_t page);

  [[nodiscard]] std::int32_t ref_count(std::int32_t page) const;
  [[nodiscard]] std::int32_t num_pages() const { return static_cast<std::int32_t>(refs_.size()); }
  [[nodiscard]] std::int32_t free_pages() const { return static_cast<std::int32_t>(free_.size()); }

 private:
  std::vector<std::int32_t> refs_;
  std::vector<std::int32_t> free_;  // stack
};

}  // namespace twilight

#endif  // TWILIGHT_KVCACHE_PAGE_POOL_H_
