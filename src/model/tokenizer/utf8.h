#ifndef TWILIGHT_MODEL_TOKENIZER_UTF8_H_
#define TWILIGHT_MODEL_TOKENIZER_UTF8_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace twilight {

/// U+FFFD.
inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

/// Result of looking at the first sequence of a non-empty text.
struct Utf8Sequence {
  std::size_t length;  ///< bytes of the character, or of the maximal malformed subpart; >= 1
  bool valid;
  bool truncated;  ///< not valid, but more bytes after the end could make it so
};
[[nodiscard]] Utf8Sequence next_utf8(std::string_view text);

/// Strict: no overlong forms, no surrogates, nothing above U+10FFFF.
[[nodiscard]] bool is_valid_utf8(std::string_view text);

/// Each maximal malformed subpart becomes one U+FFFD.
[[nodiscard]] std::string replace_invalid_utf8(std::string_view text);

/// Length of the sequence at the end that more bytes could complete; 0 to 3.
[[nodiscard]] std::size_t incomplete_utf8_tail(std::string_view text);

/// Bytes of the character that starts with `lead`, in valid UTF-8.
[[nodiscard]] constexpr std::size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

/// Code point of one valid character of `utf8_length` bytes at `text`.
[[nodiscard]] char32_t decode_utf8(const char* text);

void append_utf8(char32_t code_point, std::string& out);

/// Replaces every `from` (not empty), left to right.
[[nodiscard]] std::string replace_all(std::string_view text, std::string_view from,
                                      std::string_view to);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_UTF8_H_
