#ifndef TWILIGHT_APPS_LAB_TEXT_H_
#define TWILIGHT_APPS_LAB_TEXT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "twilight/engine.h"

namespace twilight::app {

/// A line to hide in a text.
struct HiddenLine {
  double depth = 0;  ///< where, 0 start to 1 end
  std::string line;  ///< without its end
};

/// Ordinary text that prompts are made of, from its start on, so that prompts share what precedes
/// their first difference.
class FillerText {
 public:
  /// `name` is what errors call it. Throws Error(kInvalidArgument) if the text is empty.
  FillerText(const Model& model, std::string name, std::string text);

  [[nodiscard]] const Model& model() const { return model_; }
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] const std::string& text() const { return text_; }
  /// Tokens of the plain text, begin token included.
  [[nodiscard]] const std::vector<std::int32_t>& tokens() const { return tokens_; }

  /// The longest start of the text that fits `budget` tokens together with the lines, each on a
  /// line of its own at its depth; no line end at the end. Throws Error(kInvalidArgument) where the
  /// budget leaves no room for text or the text is too short to fill it.
  [[nodiscard]] std::vector<std::int32_t> fill(std::int64_t budget,
                                               std::vector<HiddenLine> lines) const;

 private:
  Model model_;
  std::string name_, text_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::int64_t> ends_;  // byte offset after each token of the text
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LAB_TEXT_H_
