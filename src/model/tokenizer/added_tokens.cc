#include "model/tokenizer/added_tokens.h"

#include <algorithm>

#include "model/tokenizer/regex.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

std::size_t previous_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

bool matches(const Regex& regex, std::string_view character) {
  std::size_t begin = 0;
  std::size_t end = 0;
  return Regex::Matches(regex, character).next(begin, end);
}

bool is_word(std::string_view character) {
  // Here the reference implementation runs another engine than for patterns: UTS 18 word
  // characters.
  static const Regex kWord(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])");
  return matches(kWord, character);
}

bool is_space(std::string_view character) {
  static const Regex kSpace("\\s");
  return matches(kSpace, character);
}

bool ends_with_word(std::string_view text) {
  return !text.empty() && is_word(text.substr(previous_character(text)));
}

bool starts_with_word(std::string_view text) {
  return !text.empty() && is_word(text.substr(0, utf8_length(text[0])));
}

std::size_t without_trailing_space(std::string_view text) {
  while (!text.empty()) {
    const std::size_t at = previous_character(text);
    if (!is_space(text.substr(at))) break;
    text = text.substr(0, at);
  }
  return text.size();
}

std::size_t leading_space(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size() && is_space(text.substr(at, utf8_length(text[at])))) {
    at += utf8_length(text[at]);
  }
  return at;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token, std::string_view spelling) {
  std::uint32_t node = 0;
  for (char c : spelling) {
    const std::uint64_t key = std::uint64_t{node} << 8 | static_cast<unsigned char>(c);
    const auto next = static_cast<std::uint32_t>(token_at_.size());
    const auto [child, inserted] = children_.try_emplace(key, next);
    if (inserted) token_at_.push_back(-1);
    node = child->second;
  }
  if (node == 0 || token_at_[node] >= 0) return;
  starts_token_[static_cast<unsigned char>(spelling[0])] = true;
  token_at_[node] = static_cast<std::int32_t>(tokens_.size());
  tokens_.push_back(token);
}

std::vector<AddedTokenMatcher::Part> AddedTokenMatcher::cut(std::string_view text) const {
  std::vector<Part> parts;
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::int32_t found = -1;
    std::size_t end = at;
    if (starts_token_[static_cast<unsigned char>(text[at])]) {
      std::uint32_t node = 0;
      for (std::size_t i = at; i < text.size(); ++i) {
        const auto child =
            children_.find(std::uint64_t{node} << 8 | static_cast<unsigned char>(text[i]));
        if (child == children_.end()) break;
        node = child->second;
        if (token_at_[node] >= 0) {
          found = token_at_[node];
          end = i + 1;
        }
      }
    }
    if (found < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(found)];
    std::size_t begin = at;
    at = end;
    if (token.single_word &&
        (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end)))) {
      continue;
    }
    if (token.lstrip) begin = std::max(without_trailing_space(text.substr(0, begin)), done);
    if (token.rstrip) end += leading_space(text.substr(end));
    if (done < begin) parts.push_back({text.substr(done, begin - done), -1});
    parts.push_back({text.substr(begin, end - begin), token.id});
    done = end;
  }
  if (done < text.size()) parts.push_back({text.substr(done), -1});
  return parts;
}

}  // namespace twilight
