#include "kvcache/page_table.h"

#include <limits>
#include <utility>

#include "core/check.h"

namespace twilight {

void AppendPlan::clear() {
  copy_from.clear();
  copy_to.clear();
  slots.clear();
  sealed_pages.clear();
}

void AppendPlan::reserve(std::size_t tokens) {
  copy_from.reserve(tokens);
  copy_to.reserve(tokens);
  slots.reserve(tokens);
  sealed_pages.reserve(tokens);
}

PageTable::PageTable(PagePool& pool, std::int32_t page_size) : pool_(&pool), page_size_(page_size) {
  require(page_size >= 1 && page_size <= 256, "page_table", "page_size, got ", page_size,
          ", accepted 1 to 256");
}

PageTable::~PageTable() { release_all(); }

PageTable::PageTable(PageTable&& other) noexcept
    : pool_(other.pool_),
      page_size_(other.page_size_),
      num_tokens_(std::exchange(other.num_tokens_, 0)),
      pages_(std::exchange(other.pages_, {})) {}

PageTable& PageTable::operator=(PageTable&& other) noexcept {
  if (this != &other) {
    release_all();
    pool_ = other.pool_;
    page_size_ = other.page_size_;
    num_tokens_ = std::exchange(other.num_tokens_, 0);
    pages_ = std::exchange(other.pages_, {});
  }
  return *this;
}

void PageTable::release_all() {
  for (const std::int32_t page : pages_) pool_->release(page);
  pages_.clear();
  num_tokens_ = 0;
}

std::int32_t PageTable::pages_needed(std::int32_t num_tokens) const {
  if (num_tokens <= 0) return 0;
  const std::int64_t total = (std::int64_t{num_tokens_} + num_tokens + page_size_ - 1) / page_size_;
  const bool copies_open_page =
      num_tokens_ % page_size_ != 0 && pool_->ref_count(pages_.back()) > 1;
  return static_cast<std::int32_t>(total - static_cast<std::int64_t>(pages_.size())) +
         (copies_open_page ? 1 : 0);
}

bool PageTable::append(std::int32_t num_tokens, AppendPlan& plan) {
  require(num_tokens >= 0, "append", "number of tokens, got ", num_tokens, ", accepted 0 or more");
  require(num_tokens <= std::numeric_limits<std::int32_t>::max() - num_tokens_, "append",
          "sequence too long, got ", num_tokens_, " + ", num_tokens,
          " tokens, accepted below 2^31");
  if (pages_needed(num_tokens) > pool_->free_pages()) return false;
  for (std::int32_t i = 0; i < num_tokens; ++i) {
    const std::int32_t offset = num_tokens_ % page_size_;
    if (offset == 0) {
      pages_.push_back(*pool_->allocate());
    } else if (i == 0 && pool_->ref_count(pages_.back()) > 1) {
      const std::int32_t copy = *pool_->allocate();
      plan.copy_from.push_back(pages_.back());
      plan.copy_to.push_back(copy);
      pool_->release(pages_.back());
      pages_.back() = copy;
    }
    plan.slots.push_back(std::int64_t{pages_.back()} * page_size_ + offset);
    ++num_tokens_;
    if (offset + 1 == page_size_) plan.sealed_pages.push_back(pages_.back());
  }
  return true;
}

void PageTable::truncate(std::int32_t num_tokens) {
  require(num_tokens >= 0 && num_tokens <= num_tokens_, "truncate", "number of tokens, got ",
          num_tokens, ", accepted 0 to ", num_tokens_);
  num_tokens_ = num_tokens;
  const auto keep = static_cast<std::size_t>((num_tokens + page_size_ - 1) / page_size_);
  while (pages_.size() > keep) {
    pool_->release(pages_.back());
    pages_.pop_back();
  }
}

PageTable PageTable::fork() const {
  PageTable copy(*pool_, page_size_);
  copy.num_tokens_ = num_tokens_;
  copy.pages_ = pages_;
  for (const std::int32_t page : pages_) pool_->retain(page);
  return copy;
}

}  // namespace twilight
