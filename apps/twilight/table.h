#ifndef TWILIGHT_APPS_TABLE_H_
#define TWILIGHT_APPS_TABLE_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace twilight::app {

/// A table of text in aligned columns, the first to the left and the others to the right. The first
/// row is the heading.
class Table {
 public:
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  /// Lines with two spaces between columns, each ended by a newline.
  [[nodiscard]] std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// A number with so many decimals.
[[nodiscard]] std::string fixed(double value, int decimals);
/// At least three significant digits, no more decimals than that takes: "0.0123", "12.3", "1234".
[[nodiscard]] std::string digits3(double value);

/// Columns of `text` on a terminal, taking one for each UTF-8 character.
[[nodiscard]] std::size_t display_width(std::string_view text);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_TABLE_H_
