#ifndef TWILIGHT_APPS_MARKUP_H_
#define TWILIGHT_APPS_MARKUP_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace twilight::app {

/// Text for XML content and attributes: the five special characters escaped; bytes that are not
/// UTF-8 and characters that XML 1.0 forbids become U+FFFD.
[[nodiscard]] std::string escape_xml(std::string_view text);

/// At most `max_chars` characters of a UTF-8 text, an ellipsis the last one if it was longer.
[[nodiscard]] std::string shorten(std::string_view text, std::size_t max_chars);

/// One token as a label: outer spaces off, line ends and lone blanks as signs. Not escaped.
[[nodiscard]] std::string token_label(std::string_view token, std::size_t max_chars);

/// "16,384".
[[nodiscard]] std::string grouped(std::int64_t value);

/// A coordinate with at most two decimals and no trailing zeros.
[[nodiscard]] std::string coordinate(double value);

/// All parts in order.
template <typename... Parts>
[[nodiscard]] std::string concat(const Parts&... parts) {
  std::string out;
  ((out += parts), ...);
  return out;
}

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_MARKUP_H_
