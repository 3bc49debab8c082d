#ifndef TWILIGHT_APPS_TASK_H_
#define TWILIGHT_APPS_TASK_H_

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lab_text.h"
#include "passkey.h"

namespace twilight::app {

/// A question put after the prompt; every question of an item starts from the same prompt.
struct Question {
  std::vector<std::int32_t> tokens;     ///< the question and the start of its answer
  std::vector<std::string> references;  ///< what the answer must contain
  std::int32_t answer_tokens = 0;       ///< most tokens to generate; a line end stops earlier
  /// Instead of generating: the right answer, read token by token, and how many digits of it each
  /// token holds. A token that the model would have written itself earns its digits.
  std::vector<std::int32_t> forced;
  std::vector<std::int32_t> digits;
};

/// Which words the model holds most likely, at several places: the candidates' probabilities are
/// summed over the probes and the best `expected` of them compared with the first `expected`
/// candidates.
struct RankProbe {
  std::vector<std::uint8_t> at;          ///< [path] whether this position is a probe
  std::vector<std::int32_t> candidates;  ///< a token each, the right ones first
  std::int32_t expected = 0;
};

/// One prompt with what is asked of it.
struct TaskItem {
  std::vector<std::int32_t> prompt;  ///< read densely, once for all presets
  std::vector<std::int32_t> path;    ///< tokens after it that take the decode path
  std::vector<std::int32_t>
      targets;                      ///< what truly follows the first positions of `path`, to score
  RankProbe rank;                   ///< empty `at`: none
  std::vector<Question> questions;  ///< asked after prompt and path
};

/// A kind of evaluation: makes items from a text and a seed.
class Task {
 public:
  virtual ~Task() = default;
  [[nodiscard]] virtual std::string name() const = 0;
  /// Whether items differ by depth; if not, the grid has one depth.
  [[nodiscard]] virtual bool has_depth() const { return false; }
  /// Whether items are drawn; if not, there is one trial.
  [[nodiscard]] virtual bool is_drawn() const { return true; }
  /// Whether there is a score in 0 .. 1, and whether there is a perplexity.
  [[nodiscard]] virtual bool has_score() const { return true; }
  [[nodiscard]] virtual bool has_ppl() const { return false; }
  /// Its own settings, for reports and for --resume.
  [[nodiscard]] virtual nlohmann::ordered_json settings() const = 0;
  /// An item of at most `context` tokens, answers included. Throws Error(kInvalidArgument) where
  /// that cannot be made.
  [[nodiscard]] virtual TaskItem make(const FillerText& text, std::int32_t context, double depth,
                                      Random& random) const = 0;
};

struct PplOptions {
  std::int32_t last = 1024;  ///< positions at the end that take the decode path
};
[[nodiscard]] std::unique_ptr<Task> make_ppl_task(const PplOptions& options);

/// Facts "The special magic number for KEY is VALUE." in the text and questions for them.
struct NeedleOptions {
  std::string name = "niah";
  std::int32_t keys = 1;     ///< distinct keys in the text, those never asked for included
  std::int32_t values = 1;   ///< facts for each key, each with a value of its own
  std::int32_t queries = 1;  ///< keys asked for, one question each
};
[[nodiscard]] std::unique_ptr<Task> make_needle_task(const NeedleOptions& options);

/// Facts all over the text, a question for each, answers read digit by digit; before them `last`
/// positions of text that count for perplexity.
struct RecallOptions {
  std::int32_t facts = 6;
  std::int32_t last = 0;
};
[[nodiscard]] std::unique_ptr<Task> make_recall_task(const RecallOptions& options);

/// Variables assigned to each other all over the text; which of them hold a value?
struct ChainOptions {
  std::int32_t chains = 1;  ///< the first is asked for
  std::int32_t hops = 4;    ///< assignments after the first of a chain
};
[[nodiscard]] std::unique_ptr<Task> make_chain_task(const ChainOptions& options);

/// A long list of words: which are the common ones (cwe) or the most frequent ones of a Zipf law
/// (fwe)?
struct WordsOptions {
  bool zipf = false;
  std::int32_t common = 10;  ///< words to find
  double alpha = 2;          ///< exponent of the Zipf law
  bool ranked = true;  ///< compare likelihoods at the end of the list instead of asking in words
};
[[nodiscard]] std::unique_ptr<Task> make_words_task(const WordsOptions& options);

/// `count` different numbers in [0, n), in the order drawn; count <= n.
[[nodiscard]] std::vector<std::int32_t> draw_distinct(std::int32_t count, std::int32_t n,
                                                      Random& random);
/// A generator for one item: the same for the same names and numbers, whatever else is run.
[[nodiscard]] Random item_random(std::uint64_t seed, const std::string& identity);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_TASK_H_
