#include "server/choice_stream.h"

#include <algorithm>
#include <iterator>

namespace twilight::server {

std::int64_t count_chars(const std::string& text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; });
}

bool EventQueue::push(ChoiceEvent event) {
  {
    const std::lock_guard lock(mutex_);
    if (!event.end) {
      if (!closed_ && events_.size() >= capacity_) overflowed_ = true;
      if (closed_ || overflowed_) return false;
    }
    events_.push_back(std::move(event));
  }
  ready_.notify_one();
  return true;
}

std::optional<ChoiceEvent> EventQueue::pop(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  if (!ready_.wait_for(lock, patience, [&] { return !events_.empty(); })) return std::nullopt;
  ChoiceEvent event = std::move(events_.front());
  events_.pop_front();
  return event;
}

void EventQueue::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
}

bool EventQueue::overflowed() const {
  const std::lock_guard lock(mutex_);
  return overflowed_;
}

ChoiceSink::ChoiceSink(const Model& model, ChoiceOptions options, std::shared_ptr<EventQueue> queue)
    : model_(model),
      options_(std::move(options)),
      queue_(std::move(queue)),
      stream_(model_),
      filter_(options_.stops) {
  if (!options_.echo) return;
  for (std::size_t i = 0; i < options_.prompt.size(); ++i) {
    const bool silent = static_cast<std::int32_t>(i) < options_.silent;
    TokenText token{model_.token_bytes(options_.prompt[i]), count_chars(echo_text_), {}, {}};
    if (!silent) echo_text_ += stream_.push(options_.prompt[i]);
    if (options_.logprobs) pending_.push_back(std::move(token));
  }
  read_chars_ = shown_chars_ = count_chars(echo_text_);
}

TokenText ChoiceSink::describe(const TokenLogprobs& token) const {
  TokenText text{model_.token_bytes(token.token), read_chars_, token.logprob, {}};
  text.top.reserve(token.top.size());
  for (const auto& [id, logprob] : token.top) {
    text.top.emplace_back(model_.token_bytes(id), logprob);
  }
  return text;
}

void ChoiceSink::on_prompt(std::vector<TokenLogprobs> tokens) {
  for (std::size_t i = 1; i < tokens.size() && i < pending_.size(); ++i) {
    const std::int64_t offset = pending_[i].offset;
    pending_[i] = describe(tokens[i]);
    pending_[i].offset = offset;
  }
}

void ChoiceSink::add(const std::string& piece, ChoiceEvent& event) {
  read_chars_ += count_chars(piece);
  std::string text = filter_.push(piece);
  shown_chars_ += count_chars(text);
  if (options_.strip_leading && !begun_) {
    text.erase(0, std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  }
  begun_ = begun_ || !text.empty();
  event.text += text;
}

void ChoiceSink::release(bool all, ChoiceEvent& event) {
  const auto last = std::find_if(pending_.begin(), pending_.end(), [&](const TokenText& token) {
    return !all && token.offset >= shown_chars_;
  });
  event.tokens.insert(event.tokens.end(), std::make_move_iterator(pending_.begin()),
                      std::make_move_iterator(last));
  pending_.erase(pending_.begin(), last);
}

bool ChoiceSink::on_token(const TokenLogprobs& token) {
  ChoiceEvent event;
  event.choice = options_.choice;
  event.text = std::exchange(echo_text_, {});
  if (options_.logprobs) pending_.push_back(describe(token));
  add(stream_.push(token.token), event);
  release(false, event);
  const bool shows = !event.text.empty() || !event.tokens.empty();
  if (shows && !queue_->push(std::move(event))) return false;
  return !filter_.stopped();
}

void ChoiceSink::on_end(EndReason reason, const RequestUsage& usage, const std::string& error) {
  ChoiceEvent event;
  event.choice = options_.choice;
  event.text = std::exchange(echo_text_, {});
  const bool stopped = filter_.stopped();
  if (!stopped) {
    add(stream_.flush(), event);
    if (!filter_.stopped()) event.text += filter_.flush();
  }
  release(!stopped && !filter_.stopped(), event);
  event.end = ChoiceEnd{reason, stopped || filter_.stopped(), usage, error};
  (void)queue_->push(std::move(event));
}

}  // namespace twilight::server
