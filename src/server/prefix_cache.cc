#include "server/prefix_cache.h"

#include <algorithm>
#include <utility>

namespace twilight::server {

class PrefixCache::Node {
 public:
  std::map<std::vector<std::int32_t>, std::shared_ptr<Node>> children;  // by their block's tokens
  std::optional<Sequence> sequence;  // everything up to the block's end; none at the root
  std::int32_t users = 0;            // leases
  std::int64_t last_used = 0;
};

namespace {

template <typename Visit>
void for_each_node(const std::shared_ptr<PrefixCache::Node>& node, const Visit& visit) {
  for (const auto& [block, child] : node->children) {
    visit(*node, block, *child);
    for_each_node(child, visit);
  }
}

}  // namespace

PrefixCache::PrefixCache(std::int32_t block_tokens, std::int32_t page_size)
    : block_tokens_(block_tokens),
      block_pages_(block_tokens / page_size),
      root_(std::make_shared<Node>()) {}

PrefixCache::~PrefixCache() = default;

void PrefixCache::Lease::release() {
  for (const std::shared_ptr<Node>& node : nodes_) --node->users;
  nodes_.clear();
}

bool PrefixCache::advance(std::span<const std::int32_t> prompt, std::optional<Sequence>& sequence,
                          Lease& lease) {
  const auto block = static_cast<std::size_t>(block_tokens_);
  const std::size_t before = lease.nodes_.size();
  std::shared_ptr<Node> node = before == 0 ? root_ : lease.nodes_.back();
  ++clock_;
  for (std::size_t at = before * block; at + block < prompt.size(); at += block) {
    const auto tokens = prompt.subspan(at, block);
    const auto found = node->children.find({tokens.begin(), tokens.end()});
    if (found == node->children.end()) break;
    node = found->second;
    lease.nodes_.push_back(node);
    ++node->users;
  }
  for (const std::shared_ptr<Node>& held : lease.nodes_) held->last_used = clock_;
  if (lease.nodes_.size() == before) return false;
  sequence = node->sequence->fork();
  return true;
}

void PrefixCache::insert(std::span<const std::int32_t> prompt, const Sequence& sequence,
                         Lease& lease) {
  const auto block = static_cast<std::size_t>(block_tokens_);
  const auto tokens = prompt.subspan(lease.nodes_.size() * block, block);
  auto child = std::make_shared<Node>();
  child->sequence = sequence.fork();
  child->last_used = ++clock_;
  lease.nodes_.reserve(lease.nodes_.size() + 1);
  Node& parent = lease.nodes_.empty() ? *root_ : *lease.nodes_.back();
  if (!parent.children.emplace(std::vector(tokens.begin(), tokens.end()), child).second) return;
  ++child->users;
  lease.nodes_.push_back(std::move(child));
}

bool PrefixCache::evict() {
  Node* parent = nullptr;
  const std::vector<std::int32_t>* block = nullptr;
  std::int64_t oldest = 0;
  for_each_node(root_, [&](Node& above, const std::vector<std::int32_t>& tokens, const Node& node) {
    if (!node.children.empty() || node.users > 0) return;
    if (parent != nullptr && node.last_used >= oldest) return;
    parent = &above;
    block = &tokens;
    oldest = node.last_used;
  });
  if (parent == nullptr) return false;
  parent->children.erase(parent->children.find(*block));
  return true;
}

void PrefixCache::clear() {
  while (evict()) {
  }
}

std::int32_t PrefixCache::idle_pages() const {
  std::int32_t nodes = 0;
  for_each_node(root_, [&](const Node&, const std::vector<std::int32_t>&, const Node& node) {
    nodes += node.users == 0 ? 1 : 0;
  });
  return nodes * block_pages_;
}

}  // namespace twilight::server
