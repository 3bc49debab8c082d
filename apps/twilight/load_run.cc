#include "load_run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "interrupt.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr std::chrono::milliseconds kPoll{20};

class LoadRun {
 public:
  LoadRun(LoadClient& client, LoadSource source, const LoadText& text,
          const std::vector<std::int32_t>& mark, const LoadClient::Extra& extra,
          const LoadLimits& limits)
      : client_(client),
        source_(std::move(source)),
        text_(text),
        mark_(mark),
        extra_(extra),
        limits_(limits) {}

  std::vector<LoadResult> run(const std::function<void(std::int64_t, double)>& progress) {
    if (limits_.streams > 0) {
      for (std::int32_t i = 0; i < limits_.streams; ++i) start([this] { work(); });
    } else {
      start([this] { arrive(); });
    }
    while (threads_left() > 0) {
      std::this_thread::sleep_for(kPoll);
      const bool over = limits_.duration > 0 && now() > limits_.duration + limits_.drain;
      if (interrupted() || over || stopped_) {
        stopped_ = true;
        client_.cut();  // again and again: a request may have been between two states
      }
      progress(ended_, now());
    }
    const std::lock_guard lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
    std::sort(results_.begin(), results_.end(), [](const LoadResult& a, const LoadResult& b) {
      return a.request.index < b.request.index;
    });
    return std::move(results_);
  }

 private:
  struct Worker {
    std::thread thread;
    std::atomic<bool> done{false};
  };

  [[nodiscard]] double now() const {
    return std::chrono::duration<double>(LoadClient::Clock::now() - start_).count();
  }

  template <typename Work>
  void start(Work work) {
    const std::lock_guard lock(threads_mutex_);
    Worker& worker = threads_.emplace_back();
    try {
      worker.thread = std::thread([this, &worker, work] {
        try {
          work();
        } catch (...) {
          fail(std::current_exception());
        }
        worker.done = true;
      });
    } catch (const std::system_error& error) {
      threads_.pop_back();
      fail(std::make_exception_ptr(
          Error(ErrorCode::kOutOfMemory, "[load] cannot start thread " +
                                             std::to_string(threads_.size() + 1) +
                                             " of those that send requests: " + error.what())));
    }
  }

  void fail(std::exception_ptr failure) {
    const std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
    stopped_ = true;
  }

  // Joins those that have ended.
  std::size_t threads_left() {
    const std::lock_guard lock(threads_mutex_);
    threads_.remove_if([](Worker& worker) {
      if (!worker.done) return false;
      worker.thread.join();
      return true;
    });
    return threads_.size();
  }

  /// The next request, unless enough were sent.
  std::optional<LoadRequest> next() {
    const std::lock_guard lock(mutex_);
    if (stopped_ || (limits_.requests > 0 && taken_ >= limits_.requests) ||
        (limits_.duration > 0 && now() >= limits_.duration)) {
      return std::nullopt;
    }
    const LoadRequest request = source_.next();
    const bool late = limits_.duration > 0 && request.at >= limits_.duration;
    if (late) return std::nullopt;
    ++taken_;
    return request;
  }

  void send(const LoadRequest& request, double due) {
    LoadResult result = client_.complete(request, text_.prompt(request, mark_), extra_, start_);
    result.due = due;
    const std::lock_guard lock(mutex_);
    results_.push_back(std::move(result));
    ++ended_;
  }

  // One stream: the next request once the last has ended.
  void work() {
    while (const auto request = next()) send(*request, now());
  }

  // Sends each request when it arrives, however many are under way.
  void arrive() {
    while (const auto request = next()) {
      while (!stopped_ && now() < request->at) {
        const std::chrono::duration<double> left(request->at - now());
        std::this_thread::sleep_for(std::min<std::chrono::duration<double>>(left, kPoll));
      }
      if (stopped_) return;
      start([this, sent = *request] { send(sent, sent.at); });
    }
  }

  LoadClient& client_;
  LoadSource source_;
  const LoadText& text_;
  const std::vector<std::int32_t>& mark_;
  const LoadClient::Extra& extra_;
  LoadLimits limits_;
  LoadClient::Clock::time_point start_ = LoadClient::Clock::now();
  std::atomic<bool> stopped_{false};
  std::atomic<std::int64_t> ended_{0};
  std::mutex mutex_;  // guards what follows
  std::int64_t taken_ = 0;
  std::vector<LoadResult> results_;
  std::exception_ptr failure_;
  std::mutex threads_mutex_;
  std::list<Worker> threads_;
};

}  // namespace

std::vector<LoadResult> run_load(LoadClient& client, LoadSource source, const LoadText& text,
                                 const std::vector<std::int32_t>& mark,
                                 const LoadClient::Extra& extra, const LoadLimits& limits,
                                 const std::function<void(std::int64_t, double)>& progress) {
  return LoadRun(client, std::move(source), text, mark, extra, limits).run(progress);
}

}  // namespace twilight::app
