#ifndef TWILIGHT_SERVER_GENERATION_H_
#define TWILIGHT_SERVER_GENERATION_H_

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/api_request.h"
#include "server/choice_stream.h"
#include "server/responses.h"
#include "server/scheduler.h"

namespace twilight::server {

struct GenerationOptions {
  std::string client;
  std::chrono::milliseconds timeout{0};  ///< 0: none
  std::size_t stream_events = 1024;      ///< events a stream may lie behind
  bool strip_leading = false;
};

/// The choices of one API request: submitted together, cancelled together. Used by one thread.
class Generation {
 public:
  /// Throws ApiError where the scheduler refuses; then nothing is left running.
  Generation(Scheduler& scheduler, ApiRequest request, const GenerationOptions& options);
  /// Cancels what still runs.
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  /// The next event, after at most `patience`. Without streaming it is added to `choices`.
  [[nodiscard]] std::optional<ChoiceEvent> next(std::chrono::milliseconds patience);
  [[nodiscard]] bool done() const { return ended_ == choices_.size(); }
  /// Cancels every choice and waits, for a moment, until they have ended.
  void cancel();
  [[nodiscard]] bool too_slow() const { return queue_->overflowed(); }

  [[nodiscard]] const ApiRequest& request() const { return request_; }
  [[nodiscard]] const std::vector<ChoiceState>& choices() const { return choices_; }
  [[nodiscard]] std::vector<ChoiceState>& choices() { return choices_; }
  [[nodiscard]] const std::vector<Scheduler::Id>& ids() const { return ids_; }

 private:
  void submit(const GenerationOptions& options);

  Scheduler& scheduler_;
  ApiRequest request_;
  std::shared_ptr<EventQueue> queue_;
  std::vector<Scheduler::Id> ids_;
  std::vector<ChoiceState> choices_;
  std::size_t ended_ = 0;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_GENERATION_H_
