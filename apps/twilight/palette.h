#ifndef TWILIGHT_APPS_PALETTE_H_
#define TWILIGHT_APPS_PALETTE_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace twilight::app {

struct Rgb {
  std::uint8_t r = 0, g = 0, b = 0;
  bool operator==(const Rgb&) const = default;
};

/// "#1f2a44".
[[nodiscard]] std::string hex(Rgb colour);

// Sequential ramps, dark at 0 and light at 1. Lightness is linear in OKLab, so steps look even and
// their order survives any colour blindness and grey printing. t outside [0, 1] is clamped, NaN is
// 0.
[[nodiscard]] Rgb dusk_colour(double t);  ///< indigo, violet, rose, amber, pale gold
[[nodiscard]] Rgb tide_colour(double t);  ///< deep blue, teal, pale green
/// OKLab lightness of a colour, 0 black to 1 white.
[[nodiscard]] double lightness(Rgb colour);

/// Drawings quantise values to this many levels, one style class each.
inline constexpr int kColourLevels = 64;
[[nodiscard]] int colour_level(double t);

/// Style rules ".<prefix><level>{<property>:...}" of a ramp. On a light background level 0 is the
/// light end, in a dark scheme the dark one: what differs more from the background means more.
[[nodiscard]] std::string ramp_css(std::string_view prefix, std::string_view property,
                                   Rgb (*ramp)(double), bool dark_scheme);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_PALETTE_H_
