#ifndef TWILIGHT_APPS_REAL_RANGE_H_
#define TWILIGHT_APPS_REAL_RANGE_H_

#include <CLI/CLI.hpp>
#include <string>

namespace twilight::app {

/// CLI::Range for real numbers, which lets NaN through.
[[nodiscard]] inline CLI::Validator real_range(double low, double high) {
  const CLI::Range range(low, high);
  return {[range, low, high](std::string& text) -> std::string {
            double value = 0;
            const bool inside =
                CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
            if (inside) return {};
            const std::string error = range(text);
            return error.empty() ? "Value " + text + " not a number" : error;
          },
          range.get_description()};
}

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_REAL_RANGE_H_
