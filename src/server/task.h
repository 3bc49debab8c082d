#ifndef TWILIGHT_SERVER_TASK_H_
#define TWILIGHT_SERVER_TASK_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/prefix_cache.h"
#include "server/scheduler.h"
#include "server/token_choice.h"

namespace twilight::server {

/// A request from its acceptance to its end. Owned by the scheduler's thread.
struct Task {
  Task(Scheduler::Id id_in, Request request_in, std::shared_ptr<RequestSink> sink_in)
      : id(id_in),
        request(std::move(request_in)),
        sink(std::move(sink_in)),
        choice(request.sampling, request.logit_bias) {}

  Scheduler::Id id;
  Request request;
  std::shared_ptr<RequestSink> sink;
  Clock::time_point accepted = Clock::now();
  std::optional<Clock::time_point> started;  ///< first prompt tokens run
  TokenChoice choice;
  std::int32_t policy = 0;  ///< number in the engine

  std::optional<Sequence> sequence;  ///< while it holds pages
  PrefixCache::Lease lease;
  std::vector<std::int32_t> generated;
  /// Generated tokens that have been through the model. After a preemption they are run again, one
  /// by one as before, so that keys and values come out the same to the bit.
  std::size_t replayed = 0;
  std::int32_t passed_over = 0;
  std::int32_t preemptions = 0;
  std::vector<TokenLogprobs> prompt_logprobs;
  RequestUsage usage;
  DecodeTotals totals;

  [[nodiscard]] std::int32_t prompt_tokens() const {
    return static_cast<std::int32_t>(request.prompt.size());
  }
  [[nodiscard]] std::int32_t prompt_left() const {
    return std::max(0, prompt_tokens() - (sequence ? sequence->num_tokens() : 0));
  }
  /// Whether its next step is a decode step.
  [[nodiscard]] bool decodes() const { return sequence && prompt_left() == 0; }
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_TASK_H_
