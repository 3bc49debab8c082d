#include "server/batch_loop.h"

#include <algorithm>
#include <span>
#include <utility>

#include "twilight/error.h"

namespace twilight::server {
namespace {

/// A waiting prompt goes next after others have been preferred to it so many times.
constexpr std::int32_t kMaxPassedOver = 8;

}  // namespace

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
    throw Error(ErrorCode::kInternal, "[prefill] no pages left where they were made free");
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

}  // namespace twilight::server
