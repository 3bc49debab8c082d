#ifndef TWILIGHT_MODEL_TOKENIZER_ADDED_TOKENS_H_
#define TWILIGHT_MODEL_TOKENIZER_ADDED_TOKENS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace twilight {

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool single_word = false;  ///< only where no word character touches it
  bool lstrip = false;       ///< takes the white space before it
  bool rstrip = false;       ///< takes the white space after it
};

/// Finds tokens in a text: leftmost, of those the longest, not overlapping. Immutable once filled.
class AddedTokenMatcher {
 public:
  /// `spelling` is what the text shows, not empty; a spelling given twice keeps its first token.
  void add(const AddedToken& token, std::string_view spelling);

  struct Part {
    std::string_view text;
    std::int32_t id;  ///< -1 for a stretch between tokens, which is never empty
  };
  /// Cuts `text` into tokens and the stretches between them, in order.
  [[nodiscard]] std::vector<Part> cut(std::string_view text) const;

 private:
  // A trie over bytes: child of node n by byte b under key n << 8 | b; node 0 is the root.
  std::unordered_map<std::uint64_t, std::uint32_t> children_;
  std::vector<std::int32_t> token_at_ = {-1};  // by node: index into tokens_, or -1
  std::vector<AddedToken> tokens_;
  bool starts_token_[256] = {};
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_ADDED_TOKENS_H_
