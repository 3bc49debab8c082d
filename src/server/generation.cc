#include "server/generation.h"

#include <iterator>
#include <limits>
#include <utility>

#include "twilight/error.h"

namespace twilight::server {
namespace {

constexpr std::chrono::seconds kCancelPatience{10};

}  // namespace

Generation::Generation(Scheduler& scheduler, ApiRequest request, const GenerationOptions& options)
    : scheduler_(scheduler),
      request_(std::move(request)),
      queue_(std::make_shared<EventQueue>(
          request_.stream ? options.stream_events : std::numeric_limits<std::size_t>::max())),
      choices_(request_.prompts.size() * static_cast<std::size_t>(request_.n)) {
  try {
    submit(options);
  } catch (...) {
    queue_->close();
    for (const Scheduler::Id id : ids_) scheduler_.cancel(id);
    throw;
  }
}

Generation::~Generation() { cancel(); }

void Generation::submit(const GenerationOptions& options) {
  const auto n = static_cast<std::size_t>(request_.n);
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    const std::size_t p = i / n;
    ChoiceOptions choice;
    choice.choice = static_cast<std::int32_t>(i);
    choice.stops = request_.stops;
    choice.logprobs = request_.logprobs;
    choice.strip_leading = options.strip_leading;
    choice.echo = request_.echo;
    if (request_.echo) choice.prompt = request_.prompts[p];
    choice.silent = request_.bos_added[p] ? 1 : 0;
    Request one = request_.base;
    one.prompt = request_.prompts[p];
    one.client = options.client;
    one.sampling.seed += i % n;
    if (options.timeout.count() > 0) one.deadline = Clock::now() + options.timeout;
    auto sink = std::make_shared<ChoiceSink>(scheduler_.model(), std::move(choice), queue_);
    std::optional<Scheduler::Id> id;
    try {
      id = scheduler_.submit(std::move(one), std::move(sink));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kInvalidArgument) throw;
      throw ApiError(400, error.what(), "invalid_value");
    }
    if (!id) throw ApiError(429, "the queue is full, try again", "queue_full").retry_after(1);
    ids_.push_back(*id);
  }
}

std::optional<ChoiceEvent> Generation::next(std::chrono::milliseconds patience) {
  std::optional<ChoiceEvent> event = queue_->pop(patience);
  if (!event) return event;
  ChoiceState& choice = choices_[static_cast<std::size_t>(event->choice)];
  if (event->end) {
    choice.end = event->end;
    ++ended_;
  }
  if (!request_.stream) {
    choice.text += event->text;
    choice.tokens.insert(choice.tokens.end(), std::make_move_iterator(event->tokens.begin()),
                         std::make_move_iterator(event->tokens.end()));
  }
  return event;
}

void Generation::cancel() {
  if (done()) return;
  queue_->close();
  for (std::size_t i = 0; i < ids_.size(); ++i) {
    if (!choices_[i].end) scheduler_.cancel(ids_[i]);
  }
  const auto until = Clock::now() + kCancelPatience;
  while (!done() && Clock::now() < until) (void)next(std::chrono::milliseconds(100));
}

}  // namespace twilight::server
