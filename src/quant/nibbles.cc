#include "quant/nibbles.h"

#include <algorithm>
#include <cmath>

#include "quant/code_place.h"
#include "quant/f16_fields.h"

namespace twilight {

std::uint16_t encode_nibbles(std::span<const float> x, std::byte* codes) {
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  const std::uint16_t bits = f16_clamped(largest / 7.5F);
  const float scale = f16_to_f32(bits);
  std::fill_n(codes, x.size() / 2, std::byte{0});
  for (std::size_t d = 0; d < x.size(); ++d) {
    float code = 7;
    if (scale > 0) {
      const float steps = std::nearbyint(x[d] / scale + 7.5F);
      code = !(steps > 0.0F) ? 0.0F : std::min(steps, 15.0F);
    }
    const CodePlace place = nibble_place(static_cast<int>(d));
    codes[place.byte] |= static_cast<std::byte>(static_cast<unsigned>(code) << place.shift);
  }
  return bits;
}

void decode_nibbles(const std::byte* codes, std::uint16_t scale, std::span<float> x) {
  const float step = f16_to_f32(scale);
  for (std::size_t d = 0; d < x.size(); ++d) {
    const CodePlace place = nibble_place(static_cast<int>(d));
    const unsigned code = (std::to_integer<unsigned>(codes[place.byte]) >> place.shift) & 15U;
    x[d] = step * (static_cast<float>(code) - 7.5F);
  }
}

}  // namespace twilight
