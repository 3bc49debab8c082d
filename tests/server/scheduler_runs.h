#ifndef TWILIGHT_TESTS_SERVER_SCHEDULER_RUNS_H_
#define TWILIGHT_TESTS_SERVER_SCHEDULER_RUNS_H_

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "server/scheduler.h"
#include "support/engine_runs.h"

/// A sink that records, and short ways to run requests in tests.
namespace twilight::test {

class Recorder final : public server::RequestSink {
 public:
  std::function<bool(std::size_t count)>
      keep_going;  ///< after each token; on the scheduler's thread

  void on_prompt(std::vector<server::TokenLogprobs> tokens) override {
    const std::lock_guard lock(mutex_);
    prompt_ = std::move(tokens);
  }
  bool on_token(const server::TokenLogprobs& token) override {
    std::size_t count = 0;
    {
      const std::lock_guard lock(mutex_);
      tokens_.push_back(token.token);
      shown_.push_back(token);
      count = tokens_.size();
    }
    changed_.notify_all();
    return !keep_going || keep_going(count);
  }
  void on_end(server::EndReason reason, const server::RequestUsage& usage,
              const std::string& error) override {
    {
      const std::lock_guard lock(mutex_);
      ++ends_;
      reason_ = reason;
      usage_ = usage;
      error_ = error;
    }
    changed_.notify_all();
  }

  /// Waits for the end, and returns why it came.
  server::EndReason wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(120), [&] { return ends_ > 0; }));
    return reason_;
  }
  void wait_for_tokens(std::size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(120),
                                  [&] { return tokens_.size() >= count || ends_ > 0; }));
  }
  [[nodiscard]] bool ended() const {
    const std::lock_guard lock(mutex_);
    return ends_ > 0;
  }
  // After the end.
  [[nodiscard]] int ends() const { return ends_; }
  [[nodiscard]] const std::vector<std::int32_t>& tokens() const { return tokens_; }
  [[nodiscard]] const std::vector<server::TokenLogprobs>& shown() const { return shown_; }
  [[nodiscard]] const std::vector<server::TokenLogprobs>& prompt() const { return prompt_; }
  [[nodiscard]] const server::RequestUsage& usage() const { return usage_; }
  [[nodiscard]] const std::string& error() const { return error_; }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::int32_t> tokens_;
  std::vector<server::TokenLogprobs> shown_, prompt_;
  int ends_ = 0;
  server::EndReason reason_ = server::EndReason::kError;
  server::RequestUsage usage_;
  std::string error_;
};

/// A scheduler on the bundled model: contexts of 512 tokens, chunks of 64, sparse from the start.
inline server::SchedulerOptions scheduler_options(std::int32_t max_seqs = 8,
                                                  std::int64_t cache_tokens = 4096) {
  server::SchedulerOptions options;
  options.engine = options_of(sparse_policy("adaptive"), 512);
  options.engine.max_seqs = max_seqs;
  options.engine.cache_tokens = cache_tokens;
  options.prefill_tokens_per_step = 64;
  return options;
}

inline server::Request request_of(std::vector<std::int32_t> prompt, std::int32_t max_tokens) {
  server::Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.ignore_eos = true;
  return request;
}

/// Checks, when it goes, that no page is held once the prefix cache is empty.
class LeakCheck {
 public:
  explicit LeakCheck(server::Scheduler& scheduler) : scheduler_(scheduler) {}
  ~LeakCheck() {
    const auto settled = [&](const auto& done) {
      const auto end = server::Clock::now() + std::chrono::seconds(30);
      server::SchedulerStats now = scheduler_.stats();
      while (!done(now) && server::Clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        now = scheduler_.stats();
      }
      return now;
    };
    const auto idle = settled([](const server::SchedulerStats& now) {
      return now.queued + now.running + now.prefilling == 0 &&
             now.pages_free + now.pages_cached == now.pages_total;
    });
    EXPECT_EQ(idle.pages_free + idle.pages_cached, idle.pages_total);
    scheduler_.clear_prefix_cache();
    const auto stats = settled([](const server::SchedulerStats& now) {
      return now.pages_free == now.pages_total && now.pages_cached == 0;
    });
    EXPECT_EQ(stats.pages_free, stats.pages_total);
    EXPECT_EQ(stats.pages_cached, 0);
    std::int64_t ended = 0;
    for (const std::int64_t count : stats.requests_ended) ended += count;
    EXPECT_EQ(ended, stats.requests_accepted);
  }

 private:
  server::Scheduler& scheduler_;
};

inline std::shared_ptr<Recorder> start(server::Scheduler& scheduler, server::Request request) {
  auto sink = std::make_shared<Recorder>();
  EXPECT_TRUE(scheduler.submit(std::move(request), sink).has_value());
  return sink;
}

/// In their order, one after the other.
inline std::vector<std::shared_ptr<Recorder>> start_all(
    server::Scheduler& scheduler, const std::vector<server::Request>& requests) {
  std::vector<std::shared_ptr<Recorder>> sinks;
  sinks.reserve(requests.size());
  for (const server::Request& request : requests) sinks.push_back(start(scheduler, request));
  return sinks;
}

/// The tokens of a request that runs in a scheduler of its own.
inline std::vector<std::int32_t> tokens_alone(const server::Request& request) {
  server::Scheduler scheduler(cpu(), vesper(), scheduler_options(1));
  const auto sink = start(scheduler, request);
  sink->wait();
  return sink->tokens();
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SERVER_SCHEDULER_RUNS_H_
