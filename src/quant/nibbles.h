#ifndef TWILIGHT_QUANT_NIBBLES_H_
#define TWILIGHT_QUANT_NIBBLES_H_

#include <cstddef>
#include <cstdint>
#include <span>

/// The 4-bit mid-rise vectors of index_format.h: centroids, deviant residuals, value means.
namespace twilight {

/// Writes the codes of `x` [D] into D / 2 bytes; returns the f16 bits of the scale.
std::uint16_t encode_nibbles(std::span<const float> x, std::byte* codes);

/// scale * (code - 7.5) into `x` [D].
void decode_nibbles(const std::byte* codes, std::uint16_t scale, std::span<float> x);

}  // namespace twilight

#endif  // TWILIGHT_QUANT_NIBBLES_H_
