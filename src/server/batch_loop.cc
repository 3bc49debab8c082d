#include "server/batch_loop.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <span>

#include "twilight/error.h"

namespace twilight::server {
namespace {

/// Tokens a request is given room for beyond its prompt before it starts; later pages are taken as
/// they are needed.
constexpr std::int32_t kGrowthTokens = 128;
/// A waiting prompt goes next after others have been preferred to it so many times.
constexpr std::int32_t kMaxPassedOver = 8;

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

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
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
  try {
    task.sink->on_end(reason, usage, error);
  } catch (...) {  // a sink's own trouble; its request has ended anyway
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

void BatchLoop::finish_waiting(Task& task, EndReason reason) { report_end(task, reason, {}); }

void BatchLoop::cancel(const std::set<Scheduler::Id>& ids) {
  if (ids.empty()) return;
  const auto wanted = [&](const TaskPtr& task) { return ids.count(task->id) > 0; };
  for (const TaskPtr& task : queue_.extract(wanted)) finish_waiting(*task, EndReason::kCancelled);
  for (std::size_t i = running_.size(); i-- > 0;) {
    if (wanted(running_[i])) finish(*running_[i], EndReason::kCancelled);
  }
}

void BatchLoop::end_all(EndReason reason) {
  for (const TaskPtr& task : queue_.extract([](const TaskPtr&) { return true; })) {
    finish_waiting(*task, reason);
  }
  while (!running_.empty()) finish(*running_.back(), reason);
}

void BatchLoop::end_overdue() {
  const Clock::time_point now = Clock::now();
  const auto late = [&](const TaskPtr& task) {
    return task->request.deadline && *task->request.deadline <= now;
  };
  for (const TaskPtr& task : queue_.extract(late)) finish_waiting(*task, EndReason::kDeadline);
  for (std::size_t i = running_.size(); i-- > 0;) {
    if (late(running_[i])) finish(*running_[i], EndReason::kDeadline);
  }
}

// --- pages ------------------------------------------------------------------------------------

std::int32_t BatchLoop::pages_wanted(const Task& task) const {
  const std::int32_t page = options_.engine.page_size;
  const auto done = static_cast<std::int32_t>(task.generated.size());
  const std::int32_t tokens =
      task.prompt_tokens() + std::min(task.request.max_tokens, done + kGrowthTokens);
  return (tokens + page - 1) / page;
}

// Evicts cached prefixes until so many pages are free.
bool BatchLoop::make_room(std::int32_t pages) {
  while (engine_.cache().free_pages() < pages) {
    if (!prefixes_.evict()) return false;
  }
  return true;
}

// Whether a task may start: room for it beside what running prompts will still take.
bool BatchLoop::reserve(const Task& task) {
  if (running_.empty()) return true;
  std::int32_t promised = 0;
  for (const TaskPtr& other : running_) {
    promised += std::max(0, pages_wanted(*other) - other->sequence->num_pages());
  }
  return make_room(promised + pages_wanted(task));
}

void BatchLoop::preempt_youngest() {
  TaskPtr task = std::move(running_.back());
  running_.pop_back();
  task->lease.release();
  task->sequence.reset();
  task->replayed = 0;
  ++stats_.preemptions;
  const std::string client = task->request.client;
  queue_.push_first(client, std::move(task));
}

// --- admission --------------------------------------------------------------------------------

std::int32_t BatchLoop::policy_number(const Request& request) {
  if (!request.policy) return 0;
  for (const auto& [policy, number] : policies_) {
    if (policy == *request.policy) return number;
  }
  SparsePolicy policy = *request.policy;
  if (policy.dense_below_tokens == SparsePolicy::kDenseBelowAuto && !engine_.policy().is_dense()) {
    policy.dense_below_tokens = engine_.policy().dense_below_tokens;
  }
  const std::int32_t number = engine_.add_policy(policy);
  policies_.emplace_back(*request.policy, number);
  return number;
}

void BatchLoop::admit() {
  while (!queue_.empty() && static_cast<std::int32_t>(running_.size()) < options_.engine.max_seqs &&
         reserve(*queue_.front())) {
    running_.push_back(queue_.pop());
    Task& task = *running_.back();
    task.order = ++admissions_;
    try {
      task.policy = policy_number(task.request);
    } catch (const std::exception& e) {
      finish(task, EndReason::kError, e.what());
      continue;
    }
    if (!task.started) {
      task.started = Clock::now();
      task.usage.queue_seconds = seconds_since(task.accepted);
    }
    task.prompt_logprobs.clear();
    // Scoring a prompt needs every position's logits, which a cached prefix does not have.
    std::optional<PrefixCache::Hit> hit;
    if (options_.prefix_cache && !task.request.prompt_logprobs) {
      hit = prefixes_.find(task.request.prompt);
    }
    if (hit) {
      task.sequence = std::move(hit->sequence);
      task.lease = std::move(hit->lease);
      stats_.cached_prompt_tokens += task.sequence->num_tokens();
      task.usage.cached_tokens = task.sequence->num_tokens();
    } else {
      task.sequence = engine_.cache().new_sequence();
    }
  }
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

void BatchLoop::run_prompt_chunk() {
  Task* task = next_prompt();
  if (task == nullptr) return;
  task->passed_over = 0;
  const std::int32_t page = options_.engine.page_size;
  const std::int32_t end =
      std::min((task->sequence->num_tokens() / chunk_ + 1) * chunk_, task->prompt_tokens());
  const std::int32_t pages = (end + page - 1) / page - task->sequence->num_pages();
  while (!make_room(pages)) {
    if (running_.back().get() == task && running_.size() == 1) {
      finish(*task, EndReason::kOutOfPages);
      return;
    }
    const bool self = running_.back().get() == task;
    preempt_youngest();
    if (self) return;
  }
  try {
    run_chunk(*task);
  } catch (const std::exception& e) {
    finish(*task, EndReason::kError, e.what());
  }
}

// Chunks begin at multiples of chunk_, as cached prefixes end there: what a prompt computes does
// not depend on whether its beginning was cached.
void BatchLoop::run_chunk(Task& task) {
  const std::int32_t begin = task.sequence->num_tokens();
  const std::int32_t end = std::min((begin / chunk_ + 1) * chunk_, task.prompt_tokens());
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
  if (last) prompt_done(task, row);
}

void BatchLoop::prompt_done(Task& task, std::span<const float> logits) {
  if (options_.prefix_cache) {
    prefixes_.insert(task.request.prompt, *task.sequence, task.lease);
  }
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
  try {
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
  } catch (const std::exception& e) {
    finish(task, EndReason::kError, e.what());
  }
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
  const ModelInfo& info = engine_.model().info();
  LiveKept kept{info.num_layers, info.num_kv_heads, task.sequence->num_tokens(), {}};
  for (std::int32_t layer = 0; layer < info.num_layers; ++layer) {
    const LayerStats& stats = engine_.last_stats(layer)[row];
    task.totals.add(stats);
    stats_.kv_bytes_read += stats.bytes_read;
    stats_.kv_bytes_dense += stats.bytes_dense;
    ++(is_dense(stats.path) ? dense_reasons_[static_cast<int>(stats.path)]
                            : stats_.sparse_layer_steps);
    for (const std::int32_t tokens : stats.attended) {
      kept.kept_share.push_back(static_cast<float>(tokens) /
                                static_cast<float>(std::max(stats.num_tokens, 1)));
    }
  }
  if (live_) live_(task.id, std::move(kept));
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
  ++stats_.decode_steps;
  for (std::size_t i = 0; i < group.size(); ++i) {
    Task& task = *group[i];
    const bool again = ++task.replayed < task.generated.size();
    if (again) continue;
    note_stats(task, i);
    take_logits(task, {logits_.data() + i * vocab, vocab});
  }
}

void BatchLoop::step() {
  end_overdue();
  admit();
  run_prompt_chunk();
  decode_step();
}

SchedulerStats BatchLoop::stats() const {
  SchedulerStats stats = stats_;
  for (const auto& task : running_) {
    ++(task->prompt_left() > 0 ? stats.prefilling : stats.running);
  }
  stats.pages_free = const_cast<Engine&>(engine_).cache().free_pages();
  stats.pages_cached = prefixes_.idle_pages();
  for (int path = 1; path < 6; ++path) {
    stats.dense_reasons.emplace_back(step_path_name(static_cast<StepPath>(path)),
                                     dense_reasons_[path]);
  }
  return stats;
}

}  // namespace twilight::server
