#include "passkey.h"

#include <algorithm>
#include <cmath>

#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr const char* kFirstWords[] = {
    "velvet", "silver",  "quiet", "golden", "northern", "hollow", "crimson", "gentle",
    "broken", "distant", "amber", "winter", "copper",   "hidden", "marble",  "purple"};
constexpr const char* kSecondWords[] = {
    "harbor", "lantern", "meadow",  "orchard", "bridge", "valley", "garden",  "mirror",
    "tower",  "anchor",  "feather", "compass", "river",  "window", "thunder", "village"};

}  // namespace

std::uint64_t Random::next() {
  state_ += 0x9e3779b97f4a7c15ULL;
  std::uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

bool answers(const PasskeyTask& task, const std::string& generated) {
  const std::size_t begin = generated.find_first_of("0123456789");
  return begin != std::string::npos && generated.compare(begin, task.value.size(), task.value) == 0;
}

PasskeyBuilder::PasskeyBuilder(const Model& model, std::string text)
    : model_(model), text_(std::move(text)) {
  if (text_.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "[passkey] the text is empty, got 0 characters, accepted 1 or more");
  }
  std::int64_t end = 0;
  for (const std::int32_t token : model_.encode(text_, false)) {
    end += static_cast<std::int64_t>(model_.token_bytes(token).size());
    ends_.push_back(std::min(end, static_cast<std::int64_t>(text_.size())));
  }
}

PasskeyTask PasskeyBuilder::make(std::int32_t context, double depth, std::int32_t answer_tokens,
                                 Random& random) const {
  if (!(depth >= 0 && depth <= 1)) {
    throw Error(ErrorCode::kInvalidArgument,
                "[passkey] depth, got " + std::to_string(depth) + ", accepted 0 to 1");
  }
  PasskeyTask task;
  task.depth = depth;
  task.key = std::string(kFirstWords[random.below(std::size(kFirstWords))]) + " " +
             kSecondWords[random.below(std::size(kSecondWords))];
  task.value = std::to_string(1000000 + random.below(9000000));
  task.fact = "The special magic number for " + task.key + " is " + task.value + ".";
  task.question = "Question: What is the special magic number for " + task.key +
                  "?\nAnswer: The special magic number for " + task.key + " is";
  const auto overhead =
      static_cast<std::int64_t>(model_.encode("\n" + task.fact + "\n\n\n" + task.question).size());
  const std::int64_t room = context - answer_tokens - overhead;
  if (room < 16) {
    throw Error(ErrorCode::kInvalidArgument, "[passkey] context, got " + std::to_string(context) +
                                                 " tokens, accepted at least " +
                                                 std::to_string(overhead + answer_tokens + 16));
  }
  if (room > static_cast<std::int64_t>(ends_.size())) {
    throw Error(ErrorCode::kInvalidArgument,
                "[passkey] the text is too short for the context, got " +
                    std::to_string(ends_.size()) + " tokens of text, accepted at least " +
                    std::to_string(room));
  }
  // Cutting and joining can add a token or two, so step back until the prompt fits.
  for (std::int64_t take = room; take > 0; --take) {
    const auto length = static_cast<std::size_t>(ends_[static_cast<std::size_t>(take - 1)]);
    const std::string_view part(text_.data(), length);
    std::size_t cut = static_cast<std::size_t>(std::floor(depth * static_cast<double>(length)));
    if (cut < length) {
      const std::size_t line = part.rfind('\n', cut);
      cut = line == std::string_view::npos ? 0 : line + 1;
    }
    std::string prompt(part.substr(0, cut));
    if (!prompt.empty() && prompt.back() != '\n') prompt += '\n';
    prompt += task.fact + "\n";
    prompt += part.substr(cut);
    prompt += "\n\n" + task.question;
    task.prompt = model_.encode(prompt);
    if (static_cast<std::int64_t>(task.prompt.size()) + answer_tokens <= context) break;
  }
  return task;
}

}  // namespace twilight::app
