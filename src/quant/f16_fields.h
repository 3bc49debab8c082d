#ifndef TWILIGHT_QUANT_F16_FIELDS_H_
#define TWILIGHT_QUANT_F16_FIELDS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/float16.h"

/// f16 numbers inside records.
namespace twilight {

inline constexpr float kF16Max = 65504.0F;

inline void store_f16(std::byte* at, std::uint16_t bits) { std::memcpy(at, &bits, sizeof bits); }

[[nodiscard]] inline float load_f16(const std::byte* at) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, sizeof bits);
  return f16_to_f32(bits);
}

/// Nearest f16, clamped to the finite range.
[[nodiscard]] inline std::uint16_t f16_clamped(float value) {
  return f32_to_f16(std::clamp(value, -kF16Max, kF16Max));
}

}  // namespace twilight

#endif  // TWILIGHT_QUANT_F16_FIELDS_H_
