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
  if (request.policy && !serves(*request.policy)) {
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
