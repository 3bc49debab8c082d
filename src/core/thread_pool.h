#ifndef TWILIGHT_CORE_THREAD_POOL_H_
#define TWILIGHT_CORE_THREAD_POOL_H_

#include <cstdint>
#include <memory>
#include <type_traits>

namespace twilight {

/// A fixed set of worker threads that share loops. The calling thread works too, as worker 0, so a
/// pool of one thread starts none. One loop runs at a time: `parallel_for` is not reentrant and
/// must not be called from two threads at once. Workers spin briefly between loops, then sleep.
class ThreadPool {
 public:
  /// `num_threads` >= 1 counts the caller; 0 takes the processors this process may use.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  [[nodiscard]] int num_threads() const { return num_threads_; }

  /// Calls `fn(index, worker)` once for every index in [0, count), worker in [0, num_threads()).
  /// Indices are handed out one by one in ascending order, so unequal tasks balance. Returns when
  /// all are done. Allocates nothing. The first exception thrown by `fn` is rethrown here.
  template <typename Fn>
  void parallel_for(std::int64_t count, Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    run(
        count,
        [](void* context, std::int64_t index, int worker) {
          (*static_cast<F*>(context))(index, worker);
        },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

 private:
  using Task = void (*)(void* context, std::int64_t index, int worker);
  void run(std::int64_t count, Task task, void* context);

  struct State;
  std::unique_ptr<State> state_;
  int num_threads_;
};

/// Processors this process may run on (affinity mask), at least 1.
[[nodiscard]] int available_processors();

}  // namespace twilight

#endif  // TWILIGHT_CORE_THREAD_POOL_H_
