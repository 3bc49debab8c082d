#ifndef TWILIGHT_SERVER_PREFIX_CACHE_H_
#define TWILIGHT_SERVER_PREFIX_CACHE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "twilight/kv_cache.h"

namespace twilight::server {

/// Pages of earlier prompts, for prompts that begin alike: a tree of blocks of tokens, where a node
/// shares the pages (and index records) from the start up to its block's end. Blocks are whole
/// pages, so a shared page is sealed and never copied. Not thread-safe.
class PrefixCache {
 public:
  /// `block_tokens` is a multiple of `page_size`.
  PrefixCache(std::int32_t block_tokens, std::int32_t page_size);
  ~PrefixCache();

  class Node;
  /// A running sequence's hold on the nodes whose pages it shares, from the root down; they stay.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept : nodes_(std::move(other.nodes_)) { other.nodes_.clear(); }
    Lease& operator=(Lease&& other) noexcept {
      std::swap(nodes_, other.nodes_);
      return *this;
    }
    ~Lease() { release(); }
    void release();

   private:
    friend class PrefixCache;
    std::vector<std::shared_ptr<Node>> nodes_;
  };

  /// Takes `sequence`, which holds the whole blocks of the prompt that `lease` covers, as far as
  /// further blocks are known, and stays shorter than the prompt (the last token's logits are
  /// always computed). True where it went on.
  bool advance(std::span<const std::int32_t> prompt, std::optional<Sequence>& sequence,
               Lease& lease);
  /// Keeps the block that `sequence` now ends with, the next after those that `lease` covers; not
  /// known before.
  void insert(std::span<const std::int32_t> prompt, const Sequence& sequence, Lease& lease);
  /// Gives back one block's pages that no running sequence shares, the longest unused first. False:
  /// there are none.
  bool evict();
  void clear();

  /// Pages that nobody but the cache holds: what `evict` can give back in the end.
  [[nodiscard]] std::int32_t idle_pages() const;

 private:
  std::int32_t block_tokens_;
  std::int32_t block_pages_;
  std::int64_t clock_ = 0;
  std::shared_ptr<Node> root_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_PREFIX_CACHE_H_
