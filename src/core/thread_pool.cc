#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"

namespace twilight {
namespace {

// About 150 us on a 4 GHz core: longer than the gaps between the loops of a decode step, the serial
// work of one thread included, shorter than anything a user would notice as idle load. Waking a
// sleeping worker costs 20 to 40 us, as much as a small layer's whole attention.
constexpr int kSpinIterations = 10000;

void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

struct ThreadPool::State {
  std::vector<std::thread> threads;

  // Written by the caller before `generation` is raised (release), read by workers after (acquire).
  Task task = nullptr;
  void* context = nullptr;
  std::int64_t count = 0;

  alignas(64) std::atomic<std::uint64_t> generation{0};
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<int> running{0};
  std::atomic<bool> stop{false};
  std::atomic<int> sleepers{0};

  std::mutex mutex;
  std::condition_variable wake;
  std::mutex error_mutex;
  std::exception_ptr error;

  // Also where the pool's constructor could start only some of its threads.
  ~State() {
    stop.store(true, std::memory_order_relaxed);
    raise_generation();
    for (std::thread& thread : threads) thread.join();
  }

  void work(int worker) {
    for (;;) {
      const std::int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      try {
        task(context, index, worker);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }

  void loop(int worker) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpinIterations; ++spin) {
        if (generation.load(std::memory_order_acquire) != seen) break;
        cpu_relax();
      }
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return generation.load() != seen; });
        sleepers.fetch_sub(1);
      }
      seen = generation.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      work(worker);
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  // Sequentially consistent on both sides: either a worker that goes to sleep sees the new
  // generation, or it is seen here as a sleeper and woken. Where all are spinning no system call is
  // made.
  void raise_generation() {
    generation.fetch_add(1);
    if (sleepers.load() == 0) return;
    { const std::lock_guard lock(mutex); }
    wake.notify_all();
  }
};

ThreadPool::ThreadPool(int num_threads)
    : state_(std::make_unique<State>()),
      num_threads_(num_threads == 0 ? available_processors() : num_threads) {
  require(num_threads >= 0 && num_threads <= 1024, "threads", "number of threads, got ",
          num_threads, ", accepted 1 to 1024, or 0 for all processors");
  State* const state = state_.get();
  for (int worker = 1; worker < num_threads_; ++worker) {
    try {
      state->threads.emplace_back([state, worker] { state->loop(worker); });
    } catch (const std::system_error& e) {
      fail(ErrorCode::kOutOfMemory, "threads", "cannot start thread ", worker + 1, " of ",
           num_threads_, ": ", e.what());
    }
  }
}

ThreadPool::~ThreadPool() = default;

void ThreadPool::run(std::int64_t count, Task task, void* context) {
  if (count <= 0) return;
  State& state = *state_;
  if (num_threads_ == 1 || count == 1) {
    for (std::int64_t index = 0; index < count; ++index) task(context, index, 0);
    return;
  }
  state.task = task;
  state.context = context;
  state.count = count;
  state.next.store(0, std::memory_order_relaxed);
  state.running.store(num_threads_ - 1, std::memory_order_relaxed);
  state.raise_generation();
  state.work(0);
  for (int spin = 0; state.running.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpinIterations) {
      cpu_relax();
    } else {
      std::this_thread::yield();
    }
  }
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

int available_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace twilight
