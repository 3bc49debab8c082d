#include "server/batch_loop.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "twilight/error.h"

namespace twilight::server {
namespace {

/// Tokens a request is given room for beyond its prompt before it starts; later pages are taken as
/// they are needed.
constexpr std::int32_t kGrowthTokens = 128;
/// Policies of requests, beside the server's own, that are ready at once; each has buffers of the
/// largest batch and context.
constexpr std::size_t kMaxPolicies = 8;

}  // namespace

std::int32_t BatchLoop::pages_wanted(const Task& task, std::int32_t growth) const {
  const std::int32_t page = options_.engine.page_size;
  const auto done = static_cast<std::int32_t>(task.generated.size());
  const std::int32_t tokens =
      task.prompt_tokens() + std::min(task.request.max_tokens, done + growth);
  return (tokens + page - 1) / page;
}

// Evicts cached prefixes until so many pages are free.
bool BatchLoop::make_room(std::int32_t pages) {
  while (engine_.cache().free_pages() < pages) {
    if (!prefixes_.evict()) return false;
  }
  return true;
}

// Whether a task may start: room for what it does not share, beside what those that run will take
// until it has caught up.
bool BatchLoop::has_room(const Task& task, std::int32_t pages_shared) const {
  if (running_.empty()) return true;
  const std::int32_t growth = kGrowthTokens + static_cast<std::int32_t>(task.generated.size());
  std::int32_t wanted = pages_wanted(task, kGrowthTokens) - pages_shared;
  for (const TaskPtr& other : running_) {
    wanted += std::max(0, pages_wanted(*other, growth) - other->sequence->num_pages());
  }
  return wanted <= engine_.cache().free_pages() + prefixes_.idle_pages();
}

// Sends the youngest back to the queue for want of pages. The last one is never sent: `check` lets
// nothing in that the cache cannot hold alone, and what nobody runs with can be evicted.
void BatchLoop::preempt_youngest() {
  if (running_.size() < 2) {
    throw Error(ErrorCode::kInternal, "[pages] no room for one request alone");
  }
  TaskPtr task = std::move(running_.back());
  running_.pop_back();
  task->lease.release();
  task->sequence.reset();
  task->replayed = 0;
  ++task->preemptions;
  ++stats_.preemptions;
  const std::string client = task->request.client;
  queue_.push_first(client, std::move(task));
}

// Gives a task its policy's number; false while too many others are in use.
bool BatchLoop::take_policy(Task& task) {
  task.policy = 0;
  if (!task.request.policy || *task.request.policy == options_.engine.policy) return true;
  const auto known = std::find_if(policies_.begin(), policies_.end(), [&](const AddedPolicy& p) {
    return p.policy == *task.request.policy;
  });
  if (known != policies_.end()) {
    known->last_used = admissions_;
    task.policy = known->number;
    return true;
  }
  if (policies_.size() >= kMaxPolicies) {
    auto oldest = policies_.end();
    for (auto it = policies_.begin(); it != policies_.end(); ++it) {
      const bool used = std::any_of(running_.begin(), running_.end(), [&](const TaskPtr& other) {
        return other->policy == it->number;
      });
      if (!used && (oldest == policies_.end() || it->last_used < oldest->last_used)) oldest = it;
    }
    if (oldest == policies_.end()) return false;
    engine_.drop_policy(oldest->number);
    policies_.erase(oldest);
  }
  SparsePolicy policy = *task.request.policy;
  if (policy.dense_below_tokens == SparsePolicy::kDenseBelowAuto && !engine_.policy().is_dense()) {
    policy.dense_below_tokens = engine_.policy().dense_below_tokens;
  }
  task.policy = engine_.add_policy(policy);
  policies_.push_back({*task.request.policy, task.policy, admissions_});
  return true;
}

void BatchLoop::admit() {
  while (!queue_.empty() && static_cast<std::int32_t>(running_.size()) < options_.engine.max_seqs) {
    Task& task = *queue_.front();
    std::optional<Sequence> sequence;
    PrefixCache::Lease lease;
    const bool cached =
        shares_prefix(task) && prefixes_.advance(task.request.prompt, sequence, lease);
    if (!has_room(task, cached ? sequence->num_pages() : 0)) return;
    std::string error;
    try {
      if (!take_policy(task)) return;
      if (!cached) sequence = engine_.cache().new_sequence();
    } catch (const std::exception& e) {
      error = e.what();
    }
    running_.push_back(queue_.pop());
    ++admissions_;
    task.sequence = std::move(sequence);
    task.lease = std::move(lease);
    task.prompt_logprobs.clear();
    if (!task.started) {
      task.started = Clock::now();
      task.usage.queue_seconds = seconds_since(task.accepted);
    }
    if (cached) note_cached(task, task.sequence->num_tokens());
    if (!error.empty()) finish(task, EndReason::kError, error);
  }
}

// A preempted request finds its own earlier work: not a hit.
void BatchLoop::note_cached(Task& task, std::int32_t tokens) {
  if (task.preemptions > 0) return;
  task.usage.cached_tokens += tokens;
  stats_.cached_prompt_tokens += tokens;
}

// Scoring a prompt needs every position's logits, which a cached prefix does not have.
bool BatchLoop::shares_prefix(const Task& task) const {
  return options_.prefix_cache && !task.request.prompt_logprobs;
}

}  // namespace twilight::server
