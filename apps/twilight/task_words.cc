#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <set>

#include "task.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

// A common word appears this many times as often as any other.
constexpr std::int32_t kCommonTimes = 10;
// Times an uncommon word appears where the context is long enough.
constexpr std::int32_t kUncommonTimes = 3;
// Words at the end of the list after which likelihoods are compared.
constexpr std::int32_t kProbes = 32;

struct Word {
  std::string text;
  std::int32_t first_token = 0;
  std::int32_t tokens = 0;  // of " word,"
};

// Lower-case words of the text whose first tokens all differ: for each token the word of fewest
// tokens, the earliest of those. In the order of the tokens.
std::vector<Word> vocabulary(const FillerText& text) {
  std::map<std::int32_t, Word> by_token;
  std::set<std::string> seen;
  std::string word;
  const auto flush = [&] {
    if (word.size() >= 4 && word.size() <= 12 && seen.insert(word).second) {
      const std::vector<std::int32_t> tokens = text.model().encode(" " + word + ",", false);
      const auto count = static_cast<std::int32_t>(tokens.size());
      const auto it = by_token.find(tokens.front());
      if (it == by_token.end() || count < it->second.tokens) {
        by_token[tokens.front()] = {word, tokens.front(), count};
      }
    }
    word.clear();
  };
  bool lower = true;
  for (const char c : text.text()) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalpha(byte) != 0 || byte >= 0x80) {
      lower = lower && std::islower(byte) != 0;
      word += c;
      continue;
    }
    if (!lower) word.clear();
    flush();
    lower = true;
  }
  std::vector<Word> words;
  for (auto& [token, entry] : by_token) {
    // A token that is only a blank would say nothing about the word.
    if (text.model().token_bytes(token).find_first_not_of(' ') != std::string::npos) {
      words.push_back(std::move(entry));
    }
  }
  return words;
}

class WordsTask final : public Task {
 public:
  explicit WordsTask(const WordsOptions& options) : options_(options) {}
  [[nodiscard]] std::string name() const override { return options_.zipf ? "fwe" : "cwe"; }
  [[nodiscard]] nlohmann::ordered_json settings() const override {
    nlohmann::ordered_json out = {{"common", options_.common},
                                  {"answer", options_.ranked ? "rank" : "text"}};
    if (options_.zipf) out["alpha"] = options_.alpha;
    return out;
  }

  [[nodiscard]] TaskItem make(const FillerText& text, std::int32_t context, double /*depth*/,
                              Random& random) const override {
    const Model& model = text.model();
    std::vector<Word> words = shuffled(words_of(text), random);
    const auto common = static_cast<std::size_t>(options_.common);
    if (words.size() < 2 * common) {
      throw Error(ErrorCode::kInvalidArgument, "[eval] the text has too few distinct words, got " +
                                                   std::to_string(words.size()) +
                                                   ", accepted at least " +
                                                   std::to_string(2 * common));
    }
    TaskItem item;
    std::int64_t budget = context;
    Question asked;
    if (!options_.ranked) {
      asked.tokens = model.encode("\n\nQuestion: What are the " + std::to_string(options_.common) +
                                      (options_.zipf ? " most frequent" : " most common") +
                                      " words in the list above?\nAnswer: The most " +
                                      (options_.zipf ? "frequent" : "common") + " words are",
                                  false);
      for (std::size_t i = 0; i < common; ++i) {
        asked.references.push_back(words[i].text);
        asked.answer_tokens += words[i].tokens + 2;
      }
      budget -= static_cast<std::int64_t>(asked.tokens.size()) + asked.answer_tokens;
    }
    std::vector<std::size_t> list = make_list(words, budget, random);
    std::vector<std::int32_t> tokens = encode(model, words, list);
    while (static_cast<std::int64_t>(tokens.size()) > budget && !list.empty()) {
      const auto excess =
          static_cast<std::size_t>((static_cast<std::int64_t>(tokens.size()) - budget + 3) / 4);
      list.resize(list.size() - std::min(excess, list.size()));
      tokens = encode(model, words, list);
    }
    if (list.size() <= static_cast<std::size_t>(2 * kProbes)) {
      throw Error(ErrorCode::kInvalidArgument, "[eval] context, got " + std::to_string(context) +
                                                   " tokens, too few for a list of words: take a "
                                                   "larger --ctx");
    }
    if (!options_.ranked) {
      item.prompt = std::move(tokens);
      item.questions.push_back(std::move(asked));
      return item;
    }
    // The prompt ends where the last kProbes words begin; each comma from there on is a probe.
    std::vector<std::size_t> head(list.begin(), list.end() - kProbes);
    item.prompt = encode(model, words, head);
    for (auto it = list.end() - kProbes; it != list.end(); ++it) {
      const std::vector<std::int32_t> piece = model.encode(" " + words[*it].text + ",", false);
      item.path.insert(item.path.end(), piece.begin(), piece.end());
      item.rank.at.resize(item.path.size(), 0);
      item.rank.at.back() = 1;
    }
    std::vector<bool> listed(words.size(), false);
    for (const std::size_t i : list) listed[i] = true;
    for (std::size_t i = 0; i < words.size(); ++i) {
      if (listed[i] || i < common) item.rank.candidates.push_back(words[i].first_token);
    }
    item.rank.expected = options_.common;
    return item;
  }

 private:
  // The vocabulary of a text, gathered once.
  [[nodiscard]] const std::vector<Word>& words_of(const FillerText& text) const {
    std::vector<Word>& words = vocabularies_[&text];
    if (words.empty()) words = vocabulary(text);
    return words;
  }

  static std::vector<Word> shuffled(std::vector<Word> words, Random& random) {
    for (std::size_t i = words.size(); i > 1; --i) std::swap(words[i - 1], words[random.below(i)]);
    return words;
  }

  static std::vector<std::int32_t> encode(const Model& model, const std::vector<Word>& words,
                                          const std::vector<std::size_t>& list) {
    std::string text = "List:";
    for (const std::size_t i : list) text += " " + words[i].text + ",";
    return model.encode(text);
  }

  // Indices of words in the order of the list, about `budget` tokens of them; the words to find
  // come first in `words`.
  [[nodiscard]] std::vector<std::size_t> make_list(const std::vector<Word>& words,
                                                   std::int64_t budget, Random& random) const {
    double mean = 0;
    for (const Word& word : words) mean += word.tokens;
    mean /= static_cast<double>(words.size());
    const double room = static_cast<double>(budget) / mean;
    std::vector<std::size_t> list;
    if (options_.zipf) {
      double norm = 0;
      for (std::size_t k = 1; k <= words.size(); ++k) {
        norm += std::pow(static_cast<double>(k), -options_.alpha);
      }
      for (std::size_t k = 1; k <= words.size(); ++k) {
        const auto times = static_cast<std::size_t>(
            std::lround(room * std::pow(static_cast<double>(k), -options_.alpha) / norm));
        list.insert(list.end(), times, k - 1);
      }
    } else {
      const auto common = static_cast<std::size_t>(options_.common);
      const double weight = static_cast<double>(common) * kCommonTimes;
      // As few repetitions as fill the room with the words there are, three where it has that much.
      auto times =
          static_cast<std::size_t>(room / (weight + static_cast<double>(words.size() - common)));
      if (times < kUncommonTimes) {
        times = static_cast<std::size_t>(
            std::clamp(std::floor(room / (2 * weight)), 1.0, double{kUncommonTimes}));
      }
      const double rest = room / static_cast<double>(times) - weight;
      const std::size_t others = static_cast<std::size_t>(
          std::clamp(rest, 0.0, static_cast<double>(words.size() - common)));
      for (std::size_t i = 0; i < common + others; ++i) {
        list.insert(list.end(), i < common ? times * kCommonTimes : times, i);
      }
    }
    for (std::size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[random.below(i)]);
    return list;
  }

  WordsOptions options_;
  mutable std::map<const FillerText*, std::vector<Word>> vocabularies_;
};

}  // namespace

std::unique_ptr<Task> make_words_task(const WordsOptions& options) {
  return std::make_unique<WordsTask>(options);
}

}  // namespace twilight::app
