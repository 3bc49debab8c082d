#include <algorithm>
#include <iterator>

#include "task.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr const char* kNames[] = {
    "alpha",  "beta",    "gamma",   "delta",   "epsilon", "zeta",   "eta",     "theta",
    "iota",   "kappa",   "lambda",  "mu",      "nu",      "xi",     "omicron", "pi",
    "rho",    "sigma",   "tau",     "upsilon", "phi",     "chi",    "psi",     "omega",
    "harbor", "lantern", "meadow",  "orchard", "bridge",  "valley", "garden",  "mirror",
    "tower",  "anchor",  "feather", "compass", "river",   "window", "thunder", "village"};

class ChainTask final : public Task {
 public:
  explicit ChainTask(const ChainOptions& options) : options_(options) {
    if (std::int64_t{options_.chains} * (options_.hops + 1) >
        static_cast<std::int64_t>(std::size(kNames))) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[--chains] variables, got " + std::to_string(options_.chains) + " chains of " +
                      std::to_string(options_.hops + 1) + ", accepted up to " +
                      std::to_string(std::size(kNames)) + " variables in all");
    }
  }
  [[nodiscard]] std::string name() const override { return "vt"; }
  [[nodiscard]] nlohmann::ordered_json settings() const override {
    return {{"chains", options_.chains}, {"hops", options_.hops}};
  }

  [[nodiscard]] TaskItem make(const FillerText& text, std::int32_t context, double /*depth*/,
                              Random& random) const override {
    const Model& model = text.model();
    const std::int32_t length = options_.hops + 1;
    const std::vector<std::int32_t> names = draw_distinct(
        options_.chains * length, static_cast<std::int32_t>(std::size(kNames)), random);
    const std::vector<std::int32_t> numbers = draw_distinct(options_.chains, 90000, random);
    TaskItem item;
    Question asked;
    std::vector<HiddenLine> lines;
    for (std::int32_t chain = 0; chain < options_.chains; ++chain) {
      const std::string value = std::to_string(10000 + numbers[static_cast<std::size_t>(chain)]);
      // Places in order, so that every line only names what stands before it.
      std::vector<double> depths;
      depths.reserve(static_cast<std::size_t>(length));
      for (std::int32_t i = 0; i < length; ++i) {
        depths.push_back(static_cast<double>(random.below(1000)) / 1000);
      }
      std::sort(depths.begin(), depths.end());
      std::string before;
      for (std::int32_t i = 0; i < length; ++i) {
        const std::string variable =
            kNames[static_cast<std::size_t>(names[static_cast<std::size_t>(chain * length + i)])];
        lines.push_back({depths[static_cast<std::size_t>(i)],
                         "VAR " + variable + " = " + (i == 0 ? value : "VAR " + before)});
        if (chain == 0) asked.references.push_back(variable);
        before = variable;
      }
      if (chain == 0) {
        asked.tokens =
            model.encode("\n\nQuestion: Which variables hold " + value + "?\nAnswer:", false);
      }
    }
    std::string answer;
    for (const std::string& variable : asked.references) answer += " " + variable + ",";
    asked.answer_tokens = static_cast<std::int32_t>(model.encode(answer, false).size()) + 8;
    item.prompt =
        text.fill(context - static_cast<std::int64_t>(asked.tokens.size()) - asked.answer_tokens,
                  std::move(lines));
    item.questions.push_back(std::move(asked));
    return item;
  }

 private:
  ChainOptions options_;
};

}  // namespace

std::unique_ptr<Task> make_chain_task(const ChainOptions& options) {
  return std::make_unique<ChainTask>(options);
}

}  // namespace twilight::app
