#ifndef TWILIGHT_APPS_PASSKEY_H_
#define TWILIGHT_APPS_PASSKEY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "twilight/engine.h"

namespace twilight::app {

/// A small generator with a fixed sequence per seed, the same on every machine (SplitMix64).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  [[nodiscard]] std::uint64_t next();
  /// Uniform in [0, n), n >= 1; the bias of the remainder is below 2^-32 for n < 2^32.
  [[nodiscard]] std::uint64_t below(std::uint64_t n) { return next() % n; }

 private:
  std::uint64_t state_;
};

/// A fact hidden in a long text, and the question for it.
struct PasskeyTask {
  std::string key;                   ///< two words
  std::string value;                 ///< seven digits
  std::string fact;                  ///< the hidden line
  std::string question;              ///< what the prompt ends with
  double depth = 0;                  ///< where the fact stands, 0 start to 1 end
  std::vector<std::int32_t> prompt;  ///< tokens, at most the context asked for
};

/// Whether a generated continuation gives the value.
[[nodiscard]] bool answers(const PasskeyTask& task, const std::string& generated);

/// Makes tasks from one text. The text is cut so that prompts fill the context to within a few
/// tokens.
class PasskeyBuilder {
 public:
  /// Throws Error(kInvalidArgument) if the text is empty.
  PasskeyBuilder(const Model& model, std::string text);

  /// A task of at most `context` tokens, with room for `answer_tokens` more inside it. Throws
  /// Error(kInvalidArgument) if the context is too small for the fact and the question, or the text
  /// too short to fill it.
  [[nodiscard]] PasskeyTask make(std::int32_t context, double depth, std::int32_t answer_tokens,
                                 Random& random) const;

 private:
  Model model_;
  std::string text_;
  std::vector<std::int64_t> ends_;  // byte offset after each token of the text
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_PASSKEY_H_
