#include "markup.h"

#include <cstdio>

namespace twilight::app {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Length of the UTF-8 sequence at the front of `text`, 0 where it is malformed, overlong, a
// surrogate, beyond U+10FFFF or a character XML 1.0 forbids.
std::size_t sequence_length(std::string_view text) {
  const auto byte = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const unsigned lead = byte(0);
  if (lead < 0x80) return lead >= 0x20 || lead == '\t' || lead == '\n' || lead == '\r' ? 1 : 0;
  const std::size_t length = lead >= 0xF0 ? 4 : (lead >= 0xE0 ? 3 : 2);
  if (lead < 0xC2 || lead > 0xF4) return 0;
  std::uint32_t code = lead & (0x7FU >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0U) != 0x80U) return 0;
    code = (code << 6) | (byte(i) & 0x3FU);
  }
  constexpr std::uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  const bool forbidden = code == 0xFFFE || code == 0xFFFF || code > 0x10FFFF;
  return code < kSmallest[length] || surrogate || forbidden ? 0 : length;
}

}  // namespace

std::string escape_xml(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const std::size_t length = sequence_length(text);
    switch (length == 1 ? text.front() : '\0') {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += length == 0 ? kReplacement : text.substr(0, length);
    }
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return out;
}

std::string shorten(std::string_view text, std::size_t max_chars) {
  std::size_t chars = 0, last = 0, at = 0;  // `last`: where the last character allowed begins
  while (at < text.size()) {
    if (++chars == max_chars) last = at;
    if (chars > max_chars) return std::string(text.substr(0, last)) + "…";
    const std::size_t length = sequence_length(text.substr(at));
    at += length == 0 ? 1 : length;
  }
  return std::string(text);
}

std::string token_label(std::string_view token, std::size_t max_chars) {
  if (token.empty()) return "∅";
  const std::size_t first = token.find_first_not_of(" \t");
  if (first == std::string_view::npos) return "␣";
  const std::string_view core = token.substr(first, token.find_last_not_of(" \t") + 1 - first);
  std::string out;
  for (const char c : core) {
    if (c == '\n') {
      out += "↵";
    } else if (c != '\r') {
      out += c;
    }
  }
  return shorten(out, max_chars);
}

std::string grouped(std::int64_t value) {
  const std::string digits = std::to_string(value);
  std::string out;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    const bool after_digit = i > 0 && digits[i - 1] != '-';
    if (after_digit && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string coordinate(double value) {
  char text[48];
  std::snprintf(text, sizeof(text), "%.2f", value);
  std::string out = text;
  out.erase(out.find_last_not_of('0') + 1);
  if (out.back() == '.') out.pop_back();
  return out == "-0" ? "0" : out;
}

}  // namespace twilight::app
