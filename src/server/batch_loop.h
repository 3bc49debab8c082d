#ifndef TWILIGHT_SERVER_BATCH_LOOP_H_
#define TWILIGHT_SERVER_BATCH_LOOP_H_

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "server/prefix_cache.h"
#include "server/request_queue.h"
#include "server/scheduler.h"
#include "server/task.h"

namespace twilight::server {

/// The work of a scheduler's thread: owns the engine, every accepted request and the prefix cache.
/// Not thread-safe; sinks are called from inside.
class BatchLoop {
 public:
  BatchLoop(const Device& device, const Model& model, const SchedulerOptions& options);

  [[nodiscard]] const SchedulerOptions& options() const { return options_; }
  /// Throws Error(kInvalidArgument) for a request that can never run. Reads settled state only: any
  /// thread may call it.
  void check(const Request& request) const;
  /// Whether requests may have this policy; for any thread.
  [[nodiscard]] bool serves(const SparsePolicy& policy) const { return engine_.serves(policy); }

  void accept(std::unique_ptr<Task> task);
  void cancel(const std::set<Scheduler::Id>& ids);
  void end_all(EndReason reason);
  [[nodiscard]] bool idle() const { return queue_.empty() && running_.empty(); }
  /// One round: ends what is overdue, admits, runs one chunk of a prompt and one decode step.
  void step();
  /// Tells the sinks of requests that have ended since the last call. Apart from the rounds, so
  /// that who hears of an end finds it in the statistics.
  void deliver_ends();
  void clear_prefix_cache() { prefixes_.clear(); }

  /// Counters and gauges; `queued`, accepted and refused requests are the scheduler's to add.
  [[nodiscard]] SchedulerStats stats() const;
  /// Shows the kept shares of every decoding request from now on, or stops. An ended request comes
  /// once more, with no layers.
  using LiveVisitor = std::function<void(Scheduler::Id id, LiveKept kept)>;
  void watch(LiveVisitor visitor) { live_ = std::move(visitor); }
  [[nodiscard]] std::size_t queued() const { return queue_.size(); }

 private:
  using TaskPtr = std::unique_ptr<Task>;

  void end_overdue();
  void admit();
  [[nodiscard]] bool has_room(const Task& task, std::int32_t pages_shared) const;
  [[nodiscard]] std::int32_t pages_wanted(const Task& task, std::int32_t growth) const;
  bool make_room(std::int32_t pages);
  std::int32_t run_prompt_chunk();
  Task* next_prompt();
  void run_chunk(Task& task);
  void prompt_done(Task& task, std::span<const float> logits);
  void decode_step();
  [[nodiscard]] std::vector<DecodeRow> rows_of(const std::vector<Task*>& group);
  void decode_group(std::int32_t policy, std::vector<Task*>& group);
  void note_stats(Task& task, std::size_t row);
  void show_live(const Task& task, std::size_t row) const;
  void take_logits(Task& task, std::span<const float> logits);
  void take_token(Task& task, std::int32_t token, std::span<const float> logits);
  void preempt_youngest();
  bool take_policy(Task& task);
  void note_cached(Task& task, std::int32_t tokens);
  [[nodiscard]] bool shares_prefix(const Task& task) const;
  [[nodiscard]] std::int32_t chunk_end(const Task& task) const;

  /// Ends a running task; the pointer is dead afterwards.
  void finish(Task& task, EndReason reason, const std::string& error = {});
  template <class Match>
  void end_where(EndReason reason, const Match& match);
  /// Runs `work` for a task, which ends where it throws.
  template <class Work>
  void guarded(Task& task, const Work& work) {
    try {
      work();
    } catch (const std::exception& e) {
      finish(task, EndReason::kError, e.what());
    } catch (...) {
      finish(task, EndReason::kError, "unknown error");
    }
  }
  void report_end(Task& task, EndReason reason, const std::string& error);

  SchedulerOptions options_;
  std::int32_t chunk_ = 0;  ///< prompt tokens run at once: whole pages
  Engine engine_;
  PrefixCache prefixes_;
  FairQueue<TaskPtr> queue_;
  std::vector<TaskPtr> running_;  ///< in order of admission
  struct AddedPolicy {
    SparsePolicy policy;  ///< as requests give it
    std::int32_t number = 0;
    std::int64_t last_used = 0;
  };
  std::vector<AddedPolicy> policies_;
  std::int64_t admissions_ = 0;
  std::vector<float> logits_;  ///< of the rows that need them
  LiveVisitor live_;
  struct End {
    std::shared_ptr<RequestSink> sink;
    EndReason reason = EndReason::kError;
    RequestUsage usage;
    std::string error;
  };
  std::vector<End> ends_;  ///< not told yet
  SchedulerStats stats_;
  std::int64_t dense_reasons_[6] = {};  ///< by StepPath
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_BATCH_LOOP_H_
