#include "model/tokenizer/bpe_tokenizer.h"

#include <algorithm>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/check.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/bpe_model.h"
#include "model/tokenizer/json_field.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/pre_tokenizer.h"
#include "model/tokenizer/token_decoder.h"

namespace twilight {
namespace {

// Words of one text that were seen before, by where their ids lie in the output. Longer words
// rarely repeat; the entry bound keeps the memory of a text without repeats in hand.
class WordCache {
 public:
  static constexpr std::size_t kMaxWordBytes = 128;
  static constexpr std::size_t kMaxEntries = 1U << 16;

  bool append_known(std::string_view word, std::vector<std::int32_t>& ids) const {
    if (word.size() > kMaxWordBytes) return false;
    const auto found = places_.find(word);
    if (found == places_.end()) return false;
    const auto [from, to] = found->second;
    for (std::size_t i = from; i < to; ++i) ids.push_back(ids[i]);
    return true;
  }

  void remember(std::string_view word, std::size_t from, std::size_t to) {
    if (word.size() > kMaxWordBytes || places_.size() >= kMaxEntries) return;
    places_.emplace(std::string(word), std::pair{from, to});
  }

 private:
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  std::unordered_map<std::string, std::pair<std::size_t, std::size_t>, Hash, std::equal_to<>>
      places_;
};

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(const JsonField& root, const JsonField& model, bool gaps_part_words,
               std::optional<std::int32_t> bos_id)
      : Tokenizer(bos_id),
        normalizer_(root.has("normalizer") ? Normalizer(root.at("normalizer")) : Normalizer()),
        pre_tokenizer_(root.has("pre_tokenizer") ? PreTokenizer(root.at("pre_tokenizer"))
                                                 : PreTokenizer()),
        model_(model, gaps_part_words),
        decoder_(root.has("decoder") ? TokenDecoder(root.at("decoder")) : TokenDecoder()),
        vocab_size_(static_cast<int>(model_.tokens().size())) {
    if (root.has("added_tokens")) load_added_tokens(root.at("added_tokens"));
  }

  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const override {
    std::vector<std::string> tokens;
    tokens.reserve(ids.size());
    for (std::int32_t id : ids) {
      if (const std::string* token = spelling(id)) tokens.push_back(*token);
    }
    return decoder_.decode(std::move(tokens));
  }

  [[nodiscard]] std::string kind() const override { return "BPE"; }

  [[nodiscard]] int vocab_size() const override { return vocab_size_; }

  [[nodiscard]] std::string token_bytes(std::int32_t id) const override {
    const std::string* token = spelling(id);
    return token == nullptr ? std::string() : decoder_.token_bytes(*token);
  }

  [[nodiscard]] std::optional<std::int32_t> token_to_id(std::string_view token) const override {
    const auto added = added_ids_.find(std::string(token));
    if (added != added_ids_.end()) return added->second;
    return model_.find(token);
  }

 protected:
  void encode_valid(std::string_view text, std::vector<std::int32_t>& ids) const override {
    WordCache cache;
    for (const auto& raw : raw_matcher_.cut(text)) {
      if (raw.id >= 0) {
        ids.push_back(raw.id);
        continue;
      }
      const bool opens_raw = raw.text.data() == text.data();
      if (normalizer_.empty()) {
        encode_normalized(raw.text, opens_raw, cache, ids);
      } else {
        encode_normalized(normalizer_.apply(raw.text), opens_raw, cache, ids);
      }
    }
  }

 private:
  void encode_normalized(std::string_view text, bool opens_input, WordCache& cache,
                         std::vector<std::int32_t>& ids) const {
    for (const auto& part : normalized_matcher_.cut(text)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      const Words words = pre_tokenizer_.apply(std::string(part.text),
                                               opens_input && part.text.data() == text.data());
      for (const Words::Range& range : words.ranges) {
        const std::string_view word =
            std::string_view(words.text).substr(range.begin, range.end - range.begin);
        if (cache.append_known(word, ids)) continue;
        const std::size_t from = ids.size();
        model_.encode_word(word, ids);
        cache.remember(word, from, ids.size());
      }
    }
  }

  void load_added_tokens(const JsonField& list) {
    struct Entry {
      AddedToken token;
      bool special;
      bool normalized;
    };
    std::vector<Entry> entries;
    for (std::size_t i = 0; i < list.array_size(); ++i) {
      const JsonField field = list.element(i);
      Entry entry;
      entry.token.content = field.at("content").string();
      entry.token.id = field.at("id").index_below(kMaxTokenId);
      entry.token.single_word = field.boolean_or("single_word", false);
      entry.token.lstrip = field.boolean_or("lstrip", false);
      entry.token.rstrip = field.boolean_or("rstrip", false);
      entry.special = field.boolean_or("special", false);
      entry.normalized = field.boolean_or("normalized", !entry.special);
      if (entry.token.content.empty()) continue;
      const auto known = model_.find(entry.token.content);
      if (known && *known != entry.token.id) {
        field.at("id").reject(cat(*known, ", the id of this token in model.vocab"));
      }
      const auto& tokens = model_.tokens();
      const auto index = static_cast<std::size_t>(entry.token.id);
      const bool taken = !known && index < tokens.size() && !tokens[index].empty();
      if (taken ||
          !added_.try_emplace(entry.token.id, decoder_.literal(entry.token.content)).second ||
          !added_ids_.try_emplace(entry.token.content, entry.token.id).second) {
        field.at("id").reject("an id and content that no other token has");
      }
      vocab_size_ = std::max(vocab_size_, entry.token.id + 1);
      entries.push_back(std::move(entry));
    }
    // Of two tokens with one spelling after normalising, a special one wins.
    std::stable_partition(entries.begin(), entries.end(), [](const Entry& e) { return e.special; });
    for (const Entry& entry : entries) {
      if (entry.normalized) {
        normalized_matcher_.add(entry.token, normalizer_.apply(entry.token.content));
      } else {
        raw_matcher_.add(entry.token, entry.token.content);
      }
    }
  }

  // Null for ids that name no token.
  [[nodiscard]] const std::string* spelling(std::int32_t id) const {
    const auto added = added_.find(id);
    if (added != added_.end()) return &added->second;
    if (id < 0 || static_cast<std::size_t>(id) >= model_.tokens().size()) return nullptr;
    const std::string& token = model_.tokens()[static_cast<std::size_t>(id)];
    return token.empty() ? nullptr : &token;
  }

  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  BpeModel model_;
  TokenDecoder decoder_;
  int vocab_size_;
  std::unordered_map<std::int32_t, std::string> added_;  // as the decoder wants them
  std::unordered_map<std::string, std::int32_t> added_ids_;
  AddedTokenMatcher raw_matcher_;         // tokens found before normalising
  AddedTokenMatcher normalized_matcher_;  // tokens found after it
};

}  // namespace

std::unique_ptr<Tokenizer> load_bpe_tokenizer(std::string_view json, const std::string& file,
                                              std::optional<std::int32_t> bos_id) {
  nlohmann::json document;
  try {
    document = nlohmann::json::parse(json);
  } catch (const nlohmann::json::exception& error) {
    std::string reason = error.what();
    std::replace_if(
        reason.begin(), reason.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; },
        ' ');
    fail(ErrorCode::kInvalidFile, file, "malformed JSON: ", reason, ", accepted a tokenizer.json");
  }
  const JsonField root(document, file, "");
  return std::make_unique<BpeTokenizer>(root, root.at("model"), false, bos_id);
}

std::unique_ptr<Tokenizer> make_bpe_tokenizer(const nlohmann::json& document,
                                              const std::string& file,
                                              const std::string& model_name, bool gaps_part_words,
                                              std::optional<std::int32_t> bos_id) {
  return std::make_unique<BpeTokenizer>(JsonField(document, file, ""),
                                        JsonField(document.at("model"), file, model_name),
                                        gaps_part_words, bos_id);
}

}  // namespace twilight
