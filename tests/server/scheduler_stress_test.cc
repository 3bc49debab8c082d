#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "server/scheduler_runs.h"

/// Random requests, cancels and deadlines from several threads over a cache that is too small.
namespace twilight::test {
namespace {

TEST(SchedulerStress, EveryRequestEndsOnceAndNothingLeaks) {
  server::SchedulerOptions options = scheduler_options(6, 640);
  options.max_queue = 16;
  server::Scheduler scheduler(cpu(), vesper(), options);
  const LeakCheck leaks(scheduler);
  std::mutex mutex;
  std::vector<std::shared_ptr<Recorder>> sinks;
  constexpr std::size_t kRequests = 12;
  std::atomic<int> refused = 0;
  const auto client = [&](std::uint64_t number) {
    Random random(number);
    for (std::size_t i = 0; i < kRequests; ++i) {
      const auto tokens = static_cast<std::size_t>(1 + random.below(300));
      server::Request request =
          request_of(some_tokens(tokens, static_cast<std::uint64_t>(random.below(3)) + 1),
                     static_cast<std::int32_t>(random.below(60)));
      request.client = std::to_string(number);
      if (random.below(4) == 0) {
        request.deadline = server::Clock::now() + std::chrono::milliseconds(random.below(200));
      }
      if (random.below(4) == 0) request.policy = make_policy("dense");
      request.prompt_logprobs = random.below(8) == 0;
      auto sink = std::make_shared<Recorder>();
      auto id = scheduler.submit(request, sink);
      for (; !id; id = scheduler.submit(request, sink)) {  // the queue is full
        ++refused;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      {
        const std::lock_guard lock(mutex);
        sinks.push_back(sink);
      }
      if (random.below(5) == 0) scheduler.cancel(*id);
      if (random.below(10) == 0) (void)scheduler.live_kept(*id);
      if (random.below(10) == 0) scheduler.clear_prefix_cache();
      (void)scheduler.stats();
    }
  };
  constexpr std::uint64_t kClients = 4;
  std::vector<std::thread> clients;
  for (std::uint64_t i = 1; i <= kClients; ++i) clients.emplace_back(client, i);
  for (std::thread& thread : clients) thread.join();
  for (const auto& sink : sinks) {
    const server::EndReason reason = sink->wait();
    EXPECT_NE(reason, server::EndReason::kError) << sink->error();
    EXPECT_EQ(sink->ends(), 1);
  }
  EXPECT_EQ(sinks.size(), kClients * kRequests);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace twilight::test
