#ifndef TWILIGHT_APPS_LOAD_PLAN_H_
#define TWILIGHT_APPS_LOAD_PLAN_H_

#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace twilight::app {

/// How many tokens requests have: drawn log-uniformly from a range, or from a list.
class Lengths {
 public:
  /// "512", "256:32768" (log-uniform, both ends included) or "128,1024,8192" (each as likely).
  /// Throws Error(kInvalidArgument) that names `option`.
  static Lengths parse(const std::string& option, std::string_view text);

  /// `unit` in [0, 1).
  [[nodiscard]] std::int32_t draw(double unit) const;
  [[nodiscard]] std::int32_t smallest() const;
  [[nodiscard]] std::int32_t largest() const;
  [[nodiscard]] bool is_range() const { return range_; }
  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  std::string text_;
  std::vector<std::int32_t> values_;  // the two ends of a range
  bool range_ = false;
};

struct LoadShape {
  Lengths prompt, output;
  double rate = 0;             ///< requests a second, arriving at random (Poisson); 0: at once
  std::int32_t documents = 0;  ///< prompts begin at so many places of the text; 0: anywhere
  std::int32_t context = 0;    ///< tokens that a prompt and its output may have together
  std::uint64_t seed = 1;
};

struct LoadRequest {
  std::int64_t index = 0;
  double at = 0;  ///< seconds after the start when it arrives
  std::int32_t prompt_tokens = 0, output_tokens = 0;
  double place = 0;  ///< where in the text its prompt begins, in [0, 1)
};

/// The requests of a run, one after another; the same for the same shape on every machine.
class LoadSource {
 public:
  /// Throws Error(kInvalidArgument) where lengths do not fit the context. The upper end of a range
  /// of prompt lengths may exceed it: such prompts are cut to what their output leaves.
  explicit LoadSource(LoadShape shape);
  LoadRequest next();

 private:
  double unit();

  LoadShape shape_;
  std::mt19937_64 random_;
  std::int64_t index_ = 0;
  double clock_ = 0;
};

/// Cuts prompts from a text, which is taken as a circle.
class LoadText {
 public:
  /// Token ids of the text; `first` (e.g. a begin token) and `mark` come before every prompt's
  /// text. Throws Error(kInvalidArgument) where there is no text.
  LoadText(std::vector<std::int32_t> text, std::vector<std::int32_t> first);
  /// `mark`: tokens that tell this run's prompts from those of another.
  [[nodiscard]] std::vector<std::int32_t> prompt(const LoadRequest& request,
                                                 const std::vector<std::int32_t>& mark) const;

 private:
  std::vector<std::int32_t> text_, first_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LOAD_PLAN_H_
