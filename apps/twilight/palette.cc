#include "palette.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>

#include "markup.h"

namespace twilight::app {
namespace {

struct Linear {
  double r, g, b;
};

double clamped(double t) { return std::isnan(t) ? 0.0 : std::clamp(t, 0.0, 1.0); }

// OKLab (L, a, b) to linear sRGB.
Linear from_oklab(double lightness, double a, double b) {
  const double l = std::pow(lightness + 0.3963377774 * a + 0.2158037573 * b, 3);
  const double m = std::pow(lightness - 0.1055613458 * a - 0.0638541728 * b, 3);
  const double s = std::pow(lightness - 0.0894841775 * a - 1.2914855480 * b, 3);
  return {4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
          -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
          -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s};
}

bool in_gamut(const Linear& c) {
  const auto inside = [](double v) { return v >= -1e-4 && v <= 1 + 1e-4; };
  return inside(c.r) && inside(c.g) && inside(c.b);
}

std::uint8_t encode(double linear) {
  const double v = clamped(linear);
  const double s = v <= 0.0031308 ? 12.92 * v : 1.055 * std::pow(v, 1 / 2.4) - 0.055;
  return static_cast<std::uint8_t>(std::lround(255 * s));
}

double decode(std::uint8_t value) {
  const double s = value / 255.0;
  return s <= 0.04045 ? s / 12.92 : std::pow((s + 0.055) / 1.055, 2.4);
}

// The colour of this lightness, hue (degrees) and chroma, less chroma where sRGB has none so
// vivid.
Rgb from_oklch(double lightness, double chroma, double hue) {
  const double x = std::cos(hue * std::numbers::pi / 180);
  const double y = std::sin(hue * std::numbers::pi / 180);
  Linear c = from_oklab(lightness, chroma * x, chroma * y);
  for (int i = 0; i < 60 && !in_gamut(c); ++i) {
    chroma *= 0.97;
    c = from_oklab(lightness, chroma * x, chroma * y);
  }
  return {encode(c.r), encode(c.g), encode(c.b)};
}

}  // namespace

std::string hex(Rgb colour) {
  char text[8];
  std::snprintf(text, sizeof(text), "#%02x%02x%02x", colour.r, colour.g, colour.b);
  return text;
}

Rgb dusk_colour(double t) {
  t = clamped(t);
  return from_oklch(0.27 + 0.66 * t, 0.10 + 0.07 * std::sin(std::numbers::pi * t), 277 + 173 * t);
}

Rgb tide_colour(double t) {
  t = clamped(t);
  return from_oklch(0.28 + 0.66 * t, 0.07 + 0.05 * std::sin(std::numbers::pi * t), 262 - 107 * t);
}

double lightness(Rgb colour) {
  const double r = decode(colour.r), g = decode(colour.g), b = decode(colour.b);
  const double l = std::cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const double m = std::cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const double s = std::cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return 0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s;
}

int colour_level(double t) {
  return std::min(static_cast<int>(clamped(t) * kColourLevels), kColourLevels - 1);
}

std::string ramp_css(std::string_view prefix, std::string_view property, Rgb (*ramp)(double),
                     bool dark_scheme) {
  std::string out;
  for (int level = 0; level < kColourLevels; ++level) {
    const double t = static_cast<double>(level) / (kColourLevels - 1);
    const std::string colour = hex(ramp(dark_scheme ? t : 1 - t));
    out += concat(".", prefix, std::to_string(level), "{", property, ":", colour, "}");
  }
  return out;
}

}  // namespace twilight::app
