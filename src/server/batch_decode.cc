#include "server/batch_loop.h"

#include <algorithm>
#include <exception>
#include <span>
#include <utility>

#include "twilight/error.h"

namespace twilight::server {

// Draws the next token from logits that follow all tokens of the task.
void BatchLoop::take_logits(Task& task, std::span<const float> logits) {
  guarded(task, [&] { take_token(task, task.choice.sample(logits), logits); });
}

// `logits` may be empty where the request shows no log-probabilities.
void BatchLoop::take_token(Task& task, std::int32_t token, std::span<const float> logits) {
  guarded(task, [&] {
    if (token < 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[sampler] logits, got NaN or no finite maximum, accepted numbers");
    }
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
  while (!make_room(growing())) preempt_youngest();
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

// What each task of a step needs: a token, logits where more than the token depends on them, or
// nothing, for tokens that run again.
std::vector<DecodeRow> BatchLoop::rows_of(const std::vector<Task*>& group) {
  const auto vocab = static_cast<std::size_t>(engine_.model().info().vocab_size);
  const auto again = [](const Task& task) { return task.replayed + 1 < task.generated.size(); };
  const auto needs_logits = [&](const Task* task) {
    return !again(*task) && (!task->choice.draws_alone() || task->request.top_logprobs >= 0);
  };
  const auto count =
      static_cast<std::size_t>(std::count_if(group.begin(), group.end(), needs_logits));
  logits_.resize(std::max(logits_.size(), count * vocab));
  std::vector<DecodeRow> rows(group.size());
  float* next = logits_.data();
  for (std::size_t i = 0; i < group.size(); ++i) {
    if (needs_logits(group[i])) {
      rows[i].logits = {next, vocab};
      next += vocab;
    } else if (!again(*group[i])) {
      rows[i].draw = group[i]->choice.draw();
    }
  }
  return rows;
}

void BatchLoop::decode_group(std::int32_t policy, std::vector<Task*>& group) {
  std::vector<Sequence*> sequences;
  std::vector<std::int32_t> tokens;
  for (Task* task : group) {
    sequences.push_back(&*task->sequence);
    tokens.push_back(task->generated[task->replayed]);
  }
  std::vector<DecodeRow> rows = rows_of(group);
  try {
    if (engine_.decode_rows(sequences, tokens, rows, policy) != Engine::Status::kOk) {
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
    if (rows[i].draw) {
      take_token(task, rows[i].token, {});
    } else {
      take_logits(task, rows[i].logits);
    }
  }
}

}  // namespace twilight::server
