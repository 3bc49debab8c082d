#include "server/batch_loop.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <iterator>
#include <span>
#include <utility>

#include "twilight/error.h"

namespace twilight::server {
namespace {

/// Tokens a request is given room for beyond its prompt before it starts; later pages are taken as
/// they are needed.
constexpr std::int32_t kGrowthTokens = 128;
/// A waiting prompt goes next after others have been preferred to it so many times.
constexpr std::int32_t kMaxPassedOver = 8;
/// Policies of requests, beside the server's own, that are ready at once; each has buffers of the
/// largest batch and context.
constexpr std::size_t kMaxPolicies = 8;

SchedulerOptions settle(SchedulerOptions options) {
  const std::int32_t page = std::max(options.engine.page_size, 1);
  options.prefill_tokens_per_step =
      std::max((options.prefill_tokens_per_step + page - 1) / page, 1) * page;
  // One forward pass a chunk, so that results depend on where chunks begin alone.
  options.engine.prefill_chunk = options.prefill_tokens_per_step;
  return options;
}

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, "[request] " + what);
}

}  // namespace

BatchLoop::BatchLoop(const Device& device, const Model& model, const SchedulerOptions& options)
    : options_(settle(options)),
      chunk_(options_.prefill_tokens_per_step),
      engine_(device, model, options_.engine),
      prefixes_(chunk_, options_.engine.page_size) {
  options_.engine = engine_.options();
  stats_.pages_total = engine_.cache().options().num_pages;
}

void BatchLoop::check(const Request& request) const {
  const ModelInfo& info = engine_.model().info();
  const auto token_ok = [&](std::int32_t token) { return token >= 0 && token < info.vocab_size; };
  const auto refuse_token = [&](const char* field, std::int32_t token) {
    refuse(std::string(field) + ", got token " + std::to_string(token) + ", accepted 0 to " +
           std::to_string(info.vocab_size - 1));
  };
  if (request.prompt.empty()) refuse("prompt, got no tokens, accepted one or more");
  for (const std::int32_t token : request.prompt) {
    if (!token_ok(token)) refuse_token("prompt", token);
  }
  for (const auto& [token, bias] : request.logit_bias) {
    if (!token_ok(token)) refuse_token("logit_bias", token);
    if (!std::isfinite(bias)) refuse("logit_bias, got an infinite value or NaN, accepted numbers");
  }
  if (request.max_tokens < 0) {
    refuse("max_tokens, got " + std::to_string(request.max_tokens) + ", accepted 0 or more");
  }
  const std::int64_t total = std::ssize(request.prompt) + std::int64_t{request.max_tokens};
  const std::int64_t room = std::min<std::int64_t>(
      options_.engine.max_context, std::int64_t{stats_.pages_total} * options_.engine.page_size);
  if (total > room) {
    refuse("prompt and max_tokens, got " + std::to_string(request.prompt.size()) + " + " +
           std::to_string(request.max_tokens) + " tokens, accepted up to " + std::to_string(room) +
           " together");
  }
  if (request.top_logprobs < -1 || request.top_logprobs > 20) {
    refuse("top_logprobs, got " + std::to_string(request.top_logprobs) + ", accepted -1 to 20");
  }
  (void)Sampler(request.sampling);
  if (request.policy && !engine_.serves(*request.policy)) {
    refuse("policy, got '" + request.policy->name +
           "', accepted those that read the index the server keeps, of '" +
           options_.engine.policy.name + "', and dense");
  }
}

void BatchLoop::accept(std::unique_ptr<Task> task) {
  const std::string client = task->request.client;
  queue_.push(client, std::move(task));
}

void BatchLoop::report_end(Task& task, EndReason reason, const std::string& error) {
  RequestUsage& usage = task.usage;
  usage.prompt_tokens = task.prompt_tokens();
  usage.completion_tokens = static_cast<std::int32_t>(task.generated.size());
  if (!task.started) usage.queue_seconds = seconds_since(task.accepted);
  usage.total_seconds = seconds_since(task.accepted);
  usage.kv_bytes_read = task.totals.bytes_read;
  usage.kv_bytes_dense = task.totals.bytes_dense;
  usage.kept_tokens_mean = task.totals.kept_mean();
  usage.sparse_layers = task.totals.sparse_layers;
  usage.dense_layers = task.totals.dense_layers;
  ++stats_.requests_ended[static_cast<int>(reason)];
  if (live_) live_(task.id, {});
  ends_.push_back({task.sink, reason, usage, error});
}

void BatchLoop::deliver_ends() {
  for (const End& end : std::exchange(ends_, {})) {
    try {
      end.sink->on_end(end.reason, end.usage, end.error);
    } catch (...) {  // a sink's own trouble; its request has ended anyway
    }
  }
}

void BatchLoop::finish(Task& task, EndReason reason, const std::string& error) {
  const auto it = std::find_if(running_.begin(), running_.end(),
                               [&](const TaskPtr& other) { return other.get() == &task; });
  const TaskPtr held = std::move(*it);
  running_.erase(it);
  held->lease.release();
  held->sequence.reset();  // pages are free before the caller hears of the end
  report_end(*held, reason, error);
}

// Ends every task, waiting or running, that `match` picks.
template <class Match>
void BatchLoop::end_where(EndReason reason, const Match& match) {
  for (const TaskPtr& task : queue_.extract(match)) report_end(*task, reason, {});
  for (std::size_t i = running_.size(); i-- > 0;) {
    if (match(running_[i])) finish(*running_[i], reason);
  }
}

// Runs `work` for a task, which ends where it throws.
template <class Work>
void BatchLoop::guarded(Task& task, const Work& work) {
  try {
    work();
  } catch (const std::exception& e) {
    finish(task, EndReason::kError, e.what());
  } catch (...) {
    finish(task, EndReason::kError, "unknown error");
  }
}

void BatchLoop::cancel(const std::set<Scheduler::Id>& ids) {
  if (ids.empty()) return;
  end_where(EndReason::kCancelled, [&](const TaskPtr& task) { return ids.count(task->id) > 0; });
}

void BatchLoop::end_all(EndReason reason) {
  end_where(reason, [](const TaskPtr&) { return true; });
}

void BatchLoop::end_overdue() {
  const Clock::time_point now = Clock::now();
  end_where(EndReason::kDeadline, [&](const TaskPtr& task) {
    return task->request.deadline && *task->request.deadline <= now;
  });
}

// --- pages ------------------------------------------------------------------------------------

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

void BatchLoop::preempt_youngest() {
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

// --- admission --------------------------------------------------------------------------------

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

// --- prompts ----------------------------------------------------------------------------------

// The shortest remaining prompt first, so that a short one does not wait for a long one; but none
// is passed over for ever.
Task* BatchLoop::next_prompt() {
  Task* best = nullptr;
  for (const TaskPtr& task : running_) {
    if (task->prompt_left() == 0) continue;
    if (task->passed_over >= kMaxPassedOver) return task.get();
    if (best == nullptr || task->prompt_left() < best->prompt_left()) best = task.get();
  }
  for (const TaskPtr& task : running_) {
    if (task->prompt_left() > 0 && task.get() != best) ++task->passed_over;
  }
  return best;
}

// Where a prompt's next chunk ends. Chunks begin at multiples of chunk_, as cached prefixes end
// there: what a prompt computes does not depend on whether its beginning was cached.
std::int32_t BatchLoop::chunk_end(const Task& task) const {
  return std::min((task.sequence->num_tokens() / chunk_ + 1) * chunk_, task.prompt_tokens());
}

// Returns the tokens run; 0 where there is nothing to do.
std::int32_t BatchLoop::run_prompt_chunk() {
  Task* task = next_prompt();
  if (task == nullptr) return 0;
  // Another request may have run the next blocks in the meantime.
  const std::int32_t before = task->sequence->num_tokens();
  if (shares_prefix(*task) && before % chunk_ == 0 &&
      prefixes_.advance(task->request.prompt, task->sequence, task->lease)) {
    note_cached(*task, task->sequence->num_tokens() - before);
  }
  task->passed_over = 0;
  const std::int32_t page = options_.engine.page_size;
  const std::int32_t end = chunk_end(*task);
  const std::int32_t pages = (end + page - 1) / page - task->sequence->num_pages();
  while (!make_room(pages)) {
    if (running_.size() == 1) {
      finish(*task, EndReason::kOutOfPages);
      return chunk_;
    }
    const bool self = running_.back().get() == task;
    preempt_youngest();
    if (self) return chunk_;
  }
  const std::int32_t count = end - task->sequence->num_tokens();
  guarded(*task, [&] { run_chunk(*task); });
  return count;
}

void BatchLoop::run_chunk(Task& task) {
  const std::int32_t begin = task.sequence->num_tokens();
  const std::int32_t end = chunk_end(task);
  const std::span<const std::int32_t> prompt(task.request.prompt);
  const auto tokens =
      prompt.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
  const bool last = end == task.prompt_tokens();
  const auto vocab = static_cast<std::size_t>(engine_.model().info().vocab_size);
  logits_.resize(std::max(logits_.size(), vocab));
  const std::span<float> row(logits_.data(), vocab);
  Engine::Status status;
  if (task.request.prompt_logprobs) {
    if (begin == 0) task.prompt_logprobs.push_back({prompt[0], 0, {}});
    status = engine_.prefill_scored(
        *task.sequence, tokens, [&](std::int64_t i, std::span<const float> logits) {
          const auto next = static_cast<std::size_t>(begin + i + 1);
          if (next < prompt.size()) {
            task.prompt_logprobs.push_back(
                logprobs_of(logits, prompt[next], task.request.top_logprobs));
          } else {
            std::copy(logits.begin(), logits.end(), row.begin());
          }
        });
  } else {
    status = engine_.prefill(*task.sequence, tokens, last ? row : std::span<float>{});
  }
  if (status != Engine::Status::kOk) {
    finish(task, EndReason::kOutOfPages);
    return;
  }
  stats_.prompt_tokens += end - begin;
  if (shares_prefix(task) && end - begin == chunk_) {
    prefixes_.insert(prompt, *task.sequence, task.lease);
  }
  if (last) prompt_done(task, row);
}

void BatchLoop::prompt_done(Task& task, std::span<const float> logits) {
  if (!task.generated.empty()) return;  // after a preemption: the tokens are known
  if (task.request.prompt_logprobs) task.sink->on_prompt(std::move(task.prompt_logprobs));
  if (task.request.max_tokens == 0) {
    finish(task, EndReason::kLength);
    return;
  }
  take_logits(task, logits);
}

// --- decoding ---------------------------------------------------------------------------------

// Draws the next token from logits that follow all tokens of the task.
void BatchLoop::take_logits(Task& task, std::span<const float> logits) {
  guarded(task, [&] {
    const std::int32_t token = task.choice.sample(logits);
    const auto is_end = [&](const std::vector<std::int32_t>& ends) {
      return std::find(ends.begin(), ends.end(), token) != ends.end();
    };
    if (is_end(task.request.stop_tokens) ||
        (!task.request.ignore_eos && is_end(engine_.model().info().eos_tokens))) {
      finish(task, EndReason::kStop);
      return;
    }
    if (task.generated.empty()) task.usage.first_token_seconds = seconds_since(task.accepted);
    task.generated.push_back(token);
    ++stats_.completion_tokens;
    TokenLogprobs shown;
    shown.token = token;
    if (task.request.top_logprobs >= 0) {
      shown = logprobs_of(logits, token, task.request.top_logprobs);
    }
    if (!task.sink->on_token(shown)) {
      finish(task, EndReason::kStop);
    } else if (static_cast<std::int32_t>(task.generated.size()) >= task.request.max_tokens) {
      finish(task, EndReason::kLength);
    }
  });
}

void BatchLoop::decode_step() {
  const auto growing = [&] {
    std::int32_t pages = 0;
    for (const TaskPtr& task : running_) {
      pages += task->decodes() && task->sequence->num_tokens() % options_.engine.page_size == 0;
    }
    return pages;
  };
  while (!make_room(growing())) {
    if (running_.size() == 1) {
      finish(*running_.back(), EndReason::kOutOfPages);
      return;
    }
    preempt_youngest();
  }
  std::vector<Task*> waiting;
  for (const TaskPtr& task : running_) {
    if (task->decodes()) waiting.push_back(task.get());
  }
  stats_.decode_steps += waiting.empty() ? 0 : 1;
  while (!waiting.empty()) {
    const std::int32_t policy = waiting.front()->policy;
    const auto others = std::stable_partition(
        waiting.begin(), waiting.end(), [&](const Task* task) { return task->policy == policy; });
    std::vector<Task*> group(waiting.begin(), others);
    waiting.erase(waiting.begin(), others);
    decode_group(policy, group);
  }
}

void BatchLoop::note_stats(Task& task, std::size_t row) {
  for (std::int32_t layer = 0; layer < engine_.model().info().num_layers; ++layer) {
    const LayerStats& stats = engine_.last_stats(layer)[row];
    task.totals.add(stats);
    stats_.kv_bytes_read += stats.bytes_read;
    stats_.kv_bytes_dense += stats.bytes_dense;
    ++(is_dense(stats.path) ? dense_reasons_[static_cast<int>(stats.path)]
                            : stats_.sparse_layer_steps);
  }
}

void BatchLoop::show_live(const Task& task, std::size_t row) const {
  if (!live_) return;
  const ModelInfo& info = engine_.model().info();
  LiveKept kept{info.num_layers, info.num_kv_heads, task.sequence->num_tokens(), {}};
  for (std::int32_t layer = 0; layer < info.num_layers; ++layer) {
    const LayerStats& stats = engine_.last_stats(layer)[row];
    for (const std::int32_t tokens : stats.attended) {
      kept.kept_share.push_back(static_cast<float>(tokens) /
                                static_cast<float>(std::max(stats.num_tokens, 1)));
    }
  }
  live_(task.id, std::move(kept));
}

void BatchLoop::decode_group(std::int32_t policy, std::vector<Task*>& group) {
  std::vector<Sequence*> sequences;
  std::vector<std::int32_t> tokens;
  for (Task* task : group) {
    sequences.push_back(&*task->sequence);
    tokens.push_back(task->generated[task->replayed]);
  }
  const auto vocab = static_cast<std::size_t>(engine_.model().info().vocab_size);
  logits_.resize(std::max(logits_.size(), group.size() * vocab));
  try {
    const std::span<float> rows(logits_.data(), group.size() * vocab);
    if (engine_.decode(sequences, tokens, rows, policy) != Engine::Status::kOk) {
      throw Error(ErrorCode::kInternal, "[decode] no pages left where they were made free");
    }
  } catch (const std::exception& e) {
    for (Task* task : group) finish(*task, EndReason::kError, e.what());
    return;
  }
  for (std::size_t i = 0; i < group.size(); ++i) {
    Task& task = *group[i];
    const bool again = ++task.replayed < task.generated.size();
    if (again) continue;
    note_stats(task, i);
    show_live(task, i);
    take_logits(task, {logits_.data() + i * vocab, vocab});
  }
}

void BatchLoop::step() {
  end_overdue();
  admit();
  for (std::int32_t budget = chunk_; budget > 0;) {
    const std::int32_t tokens = run_prompt_chunk();
    if (tokens == 0) break;
    budget -= tokens;
  }
  decode_step();
}

SchedulerStats BatchLoop::stats() const {
  SchedulerStats stats = stats_;
  for (const auto& task : running_) {
    ++(task->prompt_left() > 0 ? stats.prefilling : stats.running);
  }
  stats.pages_free = engine_.cache().free_pages();
  stats.pages_cached = prefixes_.idle_pages();
  for (int path = 1; path < 6; ++path) {
    stats.dense_reasons.emplace_back(step_path_name(static_cast<StepPath>(path)),
                                     dense_reasons_[path]);
  }
  return stats;
}

}  // namespace twilight::server
