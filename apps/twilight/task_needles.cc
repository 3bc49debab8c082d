#include <algorithm>
#include <cctype>
#include <iterator>

#include "task.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr const char* kFirstWords[] = {
    "velvet",  "silver",  "quiet",  "golden", "northern", "hollow", "crimson", "gentle",
    "broken",  "distant", "amber",  "winter", "copper",   "hidden", "marble",  "purple",
    "ancient", "bright",  "frozen", "narrow", "secret",   "silent", "wooden",  "yellow"};
constexpr const char* kSecondWords[] = {
    "harbor", "lantern", "meadow",  "orchard", "bridge", "valley", "garden",  "mirror",
    "tower",  "anchor",  "feather", "compass", "river",  "window", "thunder", "village",
    "castle", "forest",  "island",  "market",  "saddle", "temple", "cottage", "candle"};
constexpr auto kPairs = static_cast<std::int32_t>(std::size(kFirstWords) * std::size(kSecondWords));

std::vector<std::string> draw_keys(std::int32_t count, Random& random) {
  std::vector<std::string> keys;
  for (const std::int32_t pair : draw_distinct(count, kPairs, random)) {
    const auto i = static_cast<std::size_t>(pair);
    keys.push_back(std::string(kFirstWords[i / std::size(kSecondWords)]) + " " +
                   kSecondWords[i % std::size(kSecondWords)]);
  }
  return keys;
}

// Seven digits each, all different.
std::vector<std::string> draw_values(std::size_t count, Random& random) {
  std::vector<std::string> values;
  while (values.size() < count) {
    std::string value = std::to_string(1000000 + random.below(9000000));
    if (std::find(values.begin(), values.end(), value) == values.end()) {
      values.push_back(std::move(value));
    }
  }
  return values;
}

double draw_depth(Random& random) { return static_cast<double>(random.below(1000)) / 1000; }

std::string fact(const std::string& key, const std::string& value) {
  return "The special magic number for " + key + " is " + value + ".";
}

std::string question(const std::string& key, bool several) {
  const std::string what = several ? "numbers for " + key + " are" : "number for " + key + " is";
  return "\n\nQuestion: What " +
         std::string(several ? "are all the special magic numbers for "
                             : "is the special magic number for ") +
         key + "?\nAnswer: The special magic " + what;
}

std::int64_t longest(const std::vector<Question>& questions) {
  std::int64_t most = 0;
  for (const Question& each : questions) {
    most = std::max(most, static_cast<std::int64_t>(each.tokens.size() + each.forced.size()) +
                              each.answer_tokens);
  }
  return most;
}

class NeedleTask final : public Task {
 public:
  explicit NeedleTask(NeedleOptions options) : options_(std::move(options)) {
    if (options_.queries > options_.keys) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[--queries] keys asked for, got " + std::to_string(options_.queries) +
                      ", accepted 1 to --keys " + std::to_string(options_.keys));
    }
    if (options_.keys > kPairs) {
      throw Error(ErrorCode::kInvalidArgument, "[--keys] distinct keys, got " +
                                                   std::to_string(options_.keys) +
                                                   ", accepted 1 to " + std::to_string(kPairs));
    }
  }
  [[nodiscard]] std::string name() const override { return options_.name; }
  [[nodiscard]] bool has_depth() const override { return true; }
  [[nodiscard]] nlohmann::ordered_json settings() const override {
    if (options_.name == "passkey") return nlohmann::ordered_json::object();
    return {{"keys", options_.keys}, {"values", options_.values}, {"queries", options_.queries}};
  }

  [[nodiscard]] TaskItem make(const FillerText& text, std::int32_t context, double depth,
                              Random& random) const override {
    const Model& model = text.model();
    const auto per_key = static_cast<std::size_t>(options_.values);
    const std::vector<std::string> keys = draw_keys(options_.keys, random);
    const std::vector<std::string> values = draw_values(keys.size() * per_key, random);
    std::vector<HiddenLine> lines;
    TaskItem item;
    for (std::size_t k = 0; k < keys.size(); ++k) {
      Question asked;
      for (std::size_t v = 0; v < per_key; ++v) {
        const std::string& value = values[k * per_key + v];
        lines.push_back({lines.empty() ? depth : draw_depth(random), fact(keys[k], value)});
        asked.references.push_back(value);
      }
      if (k >= static_cast<std::size_t>(options_.queries)) continue;
      asked.tokens = model.encode(question(keys[k], per_key > 1), false);
      // Values, what stands between them, and a little more for other ways to put it.
      asked.answer_tokens = static_cast<std::int32_t>(per_key) * 11 + 2;
      item.questions.push_back(std::move(asked));
    }
    item.prompt = text.fill(context - longest(item.questions), std::move(lines));
    return item;
  }

 private:
  NeedleOptions options_;
};

class RecallTask final : public Task {
 public:
  explicit RecallTask(const RecallOptions& options) : options_(options) {}
  [[nodiscard]] std::string name() const override { return "recall"; }
  [[nodiscard]] bool has_ppl() const override { return options_.last > 0; }
  [[nodiscard]] nlohmann::ordered_json settings() const override {
    return {{"facts", options_.facts}, {"last", options_.last}};
  }

  [[nodiscard]] TaskItem make(const FillerText& text, std::int32_t context, double /*depth*/,
                              Random& random) const override {
    const Model& model = text.model();
    const auto count = static_cast<std::size_t>(options_.facts);
    const std::vector<std::string> keys = draw_keys(options_.facts, random);
    const std::vector<std::string> values = draw_values(count, random);
    std::vector<HiddenLine> lines;
    TaskItem item;
    for (std::size_t i = 0; i < count; ++i) {
      // In the middle of equal parts of the text.
      const double depth = (static_cast<double>(i) + 0.5) / static_cast<double>(count);
      lines.push_back({depth, fact(keys[i], values[i])});
      Question asked;
      asked.references = {values[i]};
      asked.tokens = model.encode(question(keys[i], false), false);
      asked.forced = model.encode(" " + values[i], false);
      for (const std::int32_t token : asked.forced) {
        const std::string bytes = model.token_bytes(token);
        asked.digits.push_back(static_cast<std::int32_t>(std::count_if(
            bytes.begin(), bytes.end(), [](unsigned char c) { return std::isdigit(c) != 0; })));
      }
      item.questions.push_back(std::move(asked));
    }
    std::vector<std::int32_t> tokens =
        text.fill(context - longest(item.questions), std::move(lines));
    if (options_.last + 1 >= static_cast<std::int32_t>(tokens.size())) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[--last] positions of text, got " + std::to_string(options_.last) +
                      ", accepted 0 to " + std::to_string(tokens.size() - 2) + " in this context");
    }
    if (options_.last > 0) {
      item.targets.assign(tokens.end() - options_.last, tokens.end());
      item.path.assign(tokens.end() - options_.last - 1, tokens.end());
      tokens.resize(tokens.size() - static_cast<std::size_t>(options_.last) - 1);
    }
    item.prompt = std::move(tokens);
    return item;
  }

 private:
  RecallOptions options_;
};

}  // namespace

std::unique_ptr<Task> make_needle_task(const NeedleOptions& options) {
  return std::make_unique<NeedleTask>(options);
}

std::unique_ptr<Task> make_recall_task(const RecallOptions& options) {
  return std::make_unique<RecallTask>(options);
}

}  // namespace twilight::app
