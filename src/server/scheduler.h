#ifndef TWILIGHT_SERVER_SCHEDULER_H_
#define TWILIGHT_SERVER_SCHEDULER_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "twilight/engine.h"

namespace twilight::server {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Log-probability (natural) of one token where it stood, and the most likely ones there.
struct TokenLogprobs {
  std::int32_t token = 0;
  float logprob = 0;
  std::vector<std::pair<std::int32_t, float>> top;  ///< descending; at most Request::top_logprobs
};

enum class EndReason { kStop, kLength, kCancelled, kDeadline, kShutdown, kError };

/// What a finished request cost. Times in seconds.
struct RequestUsage {
  std::int32_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  double queue_seconds = 0, first_token_seconds = 0, total_seconds = 0;
  std::int64_t kv_bytes_read = 0, kv_bytes_dense = 0;  ///< of decode steps
  double kept_tokens_mean = 0;  ///< kept tokens of a query head, over sparse layers and steps
  std::int64_t sparse_layers = 0, dense_layers = 0;  ///< layer steps that ran each way
};

/// Receives what a request produces, always on the scheduler's own thread, in order. Must not
/// block: hand the data on and return.
class RequestSink {
 public:
  virtual ~RequestSink();
  /// Once, before the first token, where Request::prompt_logprobs: one entry a prompt token, the
  /// first with logprob 0 and no `top` (nothing predicts it).
  virtual void on_prompt(std::vector<TokenLogprobs> tokens);
  /// A sampled token (end tokens are not shown). False: the caller has enough (a stop string, or
  /// the client has gone); the request then ends with kStop.
  virtual bool on_token(const TokenLogprobs& token) = 0;
  /// Last call, exactly once for every accepted request; `error` is one line for kError, else
  /// empty.
  virtual void on_end(EndReason reason, const RequestUsage& usage, const std::string& error) = 0;
};

struct Request {
  std::vector<std::int32_t> prompt;  ///< at least one token
  std::int32_t max_tokens = 16;      ///< 0 is allowed (scoring a prompt)
  SamplingOptions sampling;
  std::vector<std::pair<std::int32_t, float>> logit_bias;  ///< added before sampling
  std::vector<std::int32_t> stop_tokens;                   ///< beside the model's end tokens
  bool ignore_eos = false;
  std::int32_t top_logprobs =
      -1;  ///< -1: TokenLogprobs carry no logprob; 0..20: that many in `top`
  bool prompt_logprobs = false;
  std::optional<SparsePolicy> policy;  ///< empty: the scheduler's own
  std::optional<Clock::time_point> deadline;
  std::string client;  ///< fairness key, e.g. API key or address; round robin between clients
};

struct SchedulerOptions {
  EngineOptions engine;           ///< max_seqs: largest decode batch; cache_tokens: capacity
  std::int32_t max_queue = 1024;  ///< requests waiting; more are refused
  std::int32_t prefill_tokens_per_step = 256;  ///< prompt tokens run between two decode steps
  bool prefix_cache = true;  ///< keep finished prompts' sealed pages while nobody needs them
};

/// A moment's picture, for /metrics and tests.
struct SchedulerStats {
  std::int32_t running = 0, prefilling = 0, queued = 0;
  std::int32_t pages_total = 0, pages_free = 0,
               pages_cached = 0;  ///< cached: held by the prefix cache alone
  std::int64_t requests_accepted = 0, requests_refused = 0;
  std::int64_t requests_ended[6] = {};  ///< by EndReason
  std::int64_t prompt_tokens = 0, cached_prompt_tokens = 0, completion_tokens = 0;
  std::int64_t decode_steps = 0;
  std::int64_t kv_bytes_read = 0, kv_bytes_dense = 0;
  std::int64_t preemptions = 0;
  /// Layer steps that ran densely, by reason (names of stats.h), and the sparse ones.
  std::vector<std::pair<std::string, std::int64_t>> dense_reasons;
  std::int64_t sparse_layer_steps = 0;
};

/// Kept tokens per layer and KV head of the latest decode step of one request, for live views.
struct LiveKept {
  std::int32_t num_layers = 0, num_kv_heads = 0, num_tokens = 0;
  std::vector<float> kept_share;  ///< [num_layers, num_kv_heads], 1 where dense
};

/// Continuous batching of many requests over one engine: a thread of its own runs decode steps over
/// all running requests, with prompt chunks in between, admits by free pages, and reuses the sealed
/// pages of earlier prompts. What a request yields depends on it alone, not on the batch. All
/// members are thread-safe.
class Scheduler {
 public:
  Scheduler(const Device& device, const Model& model, const SchedulerOptions& options);
  /// Ends what runs with kShutdown.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  using Id = std::uint64_t;
  /// Takes a request, or returns nothing when the queue is full or a shutdown has begun. Throws
  /// Error(kInvalidArgument) naming the field for what can never run: an empty prompt, a token
  /// outside the vocabulary, prompt + max_tokens beyond the context or the cache, bad sampling or
  /// policy.
  [[nodiscard]] std::optional<Id> submit(Request request, std::shared_ptr<RequestSink> sink);
  /// Whether requests may have this policy: dense, or one that reads the index that the scheduler's
  /// own needs.
  [[nodiscard]] bool serves(const SparsePolicy& policy) const;
  /// Ends a request with kCancelled at the next step; unknown ids are ignored.
  void cancel(Id id);
  /// Refuses new requests, lets running and queued ones end, up to `patience`; then ends them with
  /// kShutdown. Returns when all have ended.
  void shutdown(std::chrono::milliseconds patience);

  [[nodiscard]] SchedulerStats stats() const;
  /// Of a running request; nothing before its first decode step. Collected only while somebody has
  /// asked within the last seconds.
  [[nodiscard]] std::optional<LiveKept> live_kept(Id id) const;
  [[nodiscard]] const Model& model() const;
  [[nodiscard]] const SchedulerOptions& options() const;
  /// Drops every page that only the prefix cache holds.
  void clear_prefix_cache();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_SCHEDULER_H_
