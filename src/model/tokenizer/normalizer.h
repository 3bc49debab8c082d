#ifndef TWILIGHT_MODEL_TOKENIZER_NORMALIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_NORMALIZER_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer/json_field.h"
#include "model/tokenizer/regex.h"

namespace twilight {

/// The `normalizer` of tokenizer.json: NFC, NFD, NFKC, NFKD, Prepend, Replace and Sequences of
/// them. Immutable, safe to share between threads.
class Normalizer {
 public:
  Normalizer() = default;
  explicit Normalizer(const JsonField& field) { add(field, 0); }

  [[nodiscard]] bool empty() const { return steps_.empty(); }
  /// `text` is valid UTF-8, so is the result.
  [[nodiscard]] std::string apply(std::string_view text) const;

 private:
  enum class Form { kNfc, kNfd, kNfkc, kNfkd };
  enum class Kind { kForm, kPrepend, kReplace, kReplacePattern };
  struct Step {
    Kind kind;
    Form form = Form::kNfc;
    std::string from;
    std::string to;
    std::shared_ptr<const Regex> pattern;
  };

  void add(const JsonField& field, int depth);
  static std::string to_form(std::string_view text, Form form);

  std::vector<Step> steps_;
};

/// Reads {"String": literal} into `literal` or {"Regex": pattern} into `regex`.
void parse_pattern(const JsonField& field, std::string& literal,
                   std::shared_ptr<const Regex>& regex);

/// Sequences nest at most this deep in a tokenizer.json.
inline constexpr int kMaxSequenceDepth = 8;

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_NORMALIZER_H_
