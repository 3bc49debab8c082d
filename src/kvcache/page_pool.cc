#include "kvcache/page_pool.h"

#include "core/check.h"

namespace twilight {

PagePool::PagePool(std::int32_t num_pages) {
  require(num_pages >= 0, "page_pool", "num_pages, got ", num_pages, ", accepted 0 or more");
  refs_.assign(static_cast<std::size_t>(num_pages), 0);
  free_.reserve(refs_.size());
  for (std::int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

std::optional<std::int32_t> PagePool::allocate() {
  if (free_.empty()) return std::nullopt;
  const std::int32_t page = free_.back();
  free_.pop_back();
  refs_[static_cast<std::size_t>(page)] = 1;
  return page;
}

void PagePool::retain(std::int32_t page) {
  TWILIGHT_DCHECK(ref_count(page) > 0);
  ++refs_[static_cast<std::size_t>(page)];
}

void PagePool::release(std::int32_t page) {
  TWILIGHT_DCHECK(ref_count(page) > 0);
  if (--refs_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);
}

std::int32_t PagePool::ref_count(std::int32_t page) const {
  return refs_[static_cast<std::size_t>(page)];
}

}  // namespace twilight
