#ifndef TWILIGHT_CORE_CHECK_H_
#define TWILIGHT_CORE_CHECK_H_

#include <cassert>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>

#include "twilight/error.h"

namespace twilight {

/// Concatenates its arguments as text; for error messages only.
template <typename... Args>
[[nodiscard]] std::string cat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// Throws Error(code, "[where] " + rest).
template <typename... Args>
[[noreturn]] void fail(ErrorCode code, std::string_view where, const Args&... rest) {
  throw Error(code, cat('[', where, "] ", rest...));
}

/// Throws Error(kInvalidArgument) unless `ok`. The text names the value and what is accepted.
template <typename... Args>
void require(bool ok, std::string_view where, const Args&... rest) {
  if (!ok) [[unlikely]]
    fail(ErrorCode::kInvalidArgument, where, rest...);
}

/// Converts between integer types; throws Error(kInvalidArgument) where the value does not fit.
template <typename To, typename From>
[[nodiscard]] To narrow(From value) {
  static_assert(std::is_integral_v<To> && std::is_integral_v<From>);
  const To out = static_cast<To>(value);
  require(static_cast<From>(out) == value && ((out < To{}) == (value < From{})), "narrow",
          "integer out of range, got ", value);
  return out;
}

}  // namespace twilight

/// Bug trap of debug builds; never for input of a caller.
#define TWILIGHT_DCHECK(condition) assert(condition)

#endif  // TWILIGHT_CORE_CHECK_H_
