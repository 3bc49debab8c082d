#include <utility>

#include "task.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

class PplTask final : public Task {
 public:
  explicit PplTask(const PplOptions& options) : options_(options) {}
  [[nodiscard]] std::string name() const override { return "ppl"; }
  [[nodiscard]] bool is_drawn() const override { return false; }
  [[nodiscard]] bool has_score() const override { return false; }
  [[nodiscard]] bool has_ppl() const override { return true; }
  [[nodiscard]] nlohmann::ordered_json settings() const override {
    return {{"last", options_.last}};
  }

  [[nodiscard]] TaskItem make(const FillerText& text, std::int32_t context, double /*depth*/,
                              Random& /*random*/) const override {
    if (options_.last >= context) {
      throw Error(ErrorCode::kInvalidArgument,
                  "[eval] --last, got " + std::to_string(options_.last) +
                      ", accepted 1 to --ctx - 1 = " + std::to_string(context - 1));
    }
    const std::vector<std::int32_t>& tokens = text.tokens();
    // One token more than the context: the last position predicts it.
    if (static_cast<std::int64_t>(tokens.size()) < std::int64_t{context} + 1) {
      throw Error(ErrorCode::kInvalidArgument, "[eval] the text is too short, got " +
                                                   std::to_string(tokens.size()) + " tokens of " +
                                                   text.name() + ", accepted at least " +
                                                   std::to_string(std::int64_t{context} + 1));
    }
    const auto path = tokens.begin() + (context - options_.last);
    TaskItem item;
    item.prompt.assign(tokens.begin(), path);
    item.path.assign(path, tokens.begin() + context);
    item.targets.assign(path + 1, tokens.begin() + context + 1);
    return item;
  }

 private:
  PplOptions options_;
};

}  // namespace

std::unique_ptr<Task> make_ppl_task(const PplOptions& options) {
  return std::make_unique<PplTask>(options);
}

std::vector<std::int32_t> draw_distinct(std::int32_t count, std::int32_t n, Random& random) {
  // The first places of a shuffle.
  std::vector<std::int32_t> out(static_cast<std::size_t>(n));
  for (std::int32_t i = 0; i < n; ++i) out[static_cast<std::size_t>(i)] = i;
  for (std::int32_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    std::swap(out[at], out[at + random.below(static_cast<std::uint64_t>(n - i))]);
  }
  out.resize(static_cast<std::size_t>(count));
  return out;
}

Random item_random(std::uint64_t seed, const std::string& identity) {
  std::uint64_t hash = 0xcbf29ce484222325ULL ^ seed;  // FNV-1a
  for (const char c : identity) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  }
  return Random(hash);
}

}  // namespace twilight::app
