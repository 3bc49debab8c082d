#ifndef TWILIGHT_SERVER_CHOICE_STREAM_H_
#define TWILIGHT_SERVER_CHOICE_STREAM_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/scheduler.h"
#include "server/stop_filter.h"

namespace twilight::server {

/// One token as responses show it.
struct TokenText {
  std::string bytes;             ///< maybe part of a character
  std::int64_t offset = 0;       ///< characters of the choice's text before it
  std::optional<float> logprob;  ///< none: nothing predicts the first token of a prompt
  std::vector<std::pair<std::string, float>> top;  ///< bytes and logprob, descending
};

struct ChoiceEnd {
  EndReason reason = EndReason::kStop;
  bool stop_string = false;
  RequestUsage usage;
  std::string error;
};

/// What became of a choice since its last event.
struct ChoiceEvent {
  std::int32_t choice = 0;
  std::string text;  ///< valid UTF-8 before any stop string
  std::vector<TokenText> tokens;
  std::optional<ChoiceEnd> end;
};

/// Hands events from the scheduler's thread to a connection's, holding at most `capacity` events
/// beside the ends. Thread-safe.
class EventQueue {
 public:
  explicit EventQueue(std::size_t capacity) : capacity_(capacity) {}
  /// False: the queue is full or closed and the event is dropped. Ends are always taken.
  [[nodiscard]] bool push(ChoiceEvent event);
  /// Nothing after `patience` without an event.
  [[nodiscard]] std::optional<ChoiceEvent> pop(std::chrono::milliseconds patience);
  /// No more events but ends.
  void close();
  /// An event was dropped because the reader is too slow.
  [[nodiscard]] bool overflowed() const;

 private:
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<ChoiceEvent> events_;
  bool closed_ = false, overflowed_ = false;
};

struct ChoiceOptions {
  std::int32_t choice = 0;
  std::vector<std::string> stops;
  bool logprobs = false;
  bool strip_leading = false;
  bool echo = false;
  /// For `echo`: the prompt, and how many of its first tokens add no text.
  std::vector<std::int32_t> prompt;
  std::int32_t silent = 0;
};

/// Turns one choice's tokens into text and events, on the scheduler's thread.
class ChoiceSink final : public RequestSink {
 public:
  ChoiceSink(const Model& model, ChoiceOptions options, std::shared_ptr<EventQueue> queue);

  void on_prompt(std::vector<TokenLogprobs> tokens) override;
  bool on_token(const TokenLogprobs& token) override;
  void on_end(EndReason reason, const RequestUsage& usage, const std::string& error) override;

 private:
  [[nodiscard]] TokenText describe(const TokenLogprobs& token) const;
  void add(const std::string& piece, ChoiceEvent& event);
  void release(bool all, ChoiceEvent& event);

  Model model_;
  ChoiceOptions options_;
  std::shared_ptr<EventQueue> queue_;
  TextStream stream_;
  StopFilter filter_;
  std::vector<TokenText> pending_;  ///< tokens whose text is held back
  std::int64_t read_chars_ = 0, shown_chars_ = 0;
  bool begun_ = false;
  std::string echo_text_;
};

/// Characters of valid UTF-8.
[[nodiscard]] std::int64_t count_chars(const std::string& text);

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_CHOICE_STREAM_H_
