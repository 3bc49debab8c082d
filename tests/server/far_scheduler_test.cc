#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "server/scheduler_runs.h"
#include "support/far_device.h"

/// The scheduler on a device whose memory the host cannot touch.
namespace twilight::test {
namespace {

using server::EndReason;
using server::Request;
using server::Scheduler;

// Requests whose tokens are drawn on the device, beside ones that need logits; stop tokens and
// limits end them at different steps, so the batch changes all the time.
std::vector<Request> mixed_requests() {
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 8; ++i) {
    Request request = request_of(some_tokens(20 + 17 * i, i + 1), 6 + static_cast<int>(i) * 2);
    request.sampling = {.temperature = 0.3 * static_cast<double>(i % 4),
                        .top_k = i % 3 == 0 ? 20 : 0,
                        .top_p = i % 2 == 0 ? 0.9 : 1,
                        .seed = i};
    if (i % 4 == 2) request.top_logprobs = static_cast<int>(i) - 2;
    if (i == 5) request.logit_bias = {{7, 2.5F}};
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(FarScheduler, WritesWhatTheHostWrites) {
  FarDevice far;
  // Room for half of what the requests want: some run again.
  Scheduler scheduler(far.device, vesper(), scheduler_options(8, 256));
  const LeakCheck leaks(scheduler);
  const std::vector<Request> requests = mixed_requests();
  const std::vector<std::shared_ptr<Recorder>> sinks = start_all(scheduler, requests);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(sinks[i]->wait(), EndReason::kLength) << sinks[i]->error();
    EXPECT_EQ(sinks[i]->tokens(), tokens_alone(requests[i])) << i;
  }
  EXPECT_GT(far.backend->replays(), 0);
}

// Two requests of 8 tokens: prefill's logits come to the host, then one row a step where
// log-probabilities are shown and none where they are not.
TEST(FarScheduler, LogitsComeToTheHostOnlyWhereTheyAreNeeded) {
  const auto row_bytes = static_cast<std::int64_t>(vesper().info().vocab_size) * 4;
  for (const bool shown : {false, true}) {
    FarDevice far;
    Scheduler scheduler(far.device, vesper(), scheduler_options());
    const LeakCheck leaks(scheduler);
    std::vector<std::shared_ptr<Recorder>> sinks;
    for (std::uint64_t i = 0; i < 2; ++i) {
      Request request = request_of(some_tokens(40, i + 1), 8);
      request.sampling = {.temperature = 0.8, .seed = i};
      if (shown && i == 0) request.top_logprobs = 0;
      request.policy = make_policy("dense");  // no lists to count for statistics
      sinks.push_back(start(scheduler, request));
    }
    for (const auto& sink : sinks) EXPECT_EQ(sink->wait(), EndReason::kLength);
    // Statistics of a step are a few hundred bytes.
    const std::int64_t logit_rows = far.backend->far_memory().downloaded_bytes() / row_bytes;
    EXPECT_EQ(logit_rows, shown ? 2 + 7 : 2);
  }
}

}  // namespace
}  // namespace twilight::test
