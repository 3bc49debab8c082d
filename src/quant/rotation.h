#ifndef TWILIGHT_QUANT_ROTATION_H_
#define TWILIGHT_QUANT_ROTATION_H_

#include <cstdint>
#include <span>

#include "core/splitmix64.h"

/// The fixed orthogonal transform R of the rotated index planes: random signs, then a normalised
/// Walsh-Hadamard transform. D is split into blocks of descending powers of two (its binary
/// digits: 128; 80 = 64 + 16; 96 = 64 + 32), each transformed by itself. R q . R k = q . k, and an
/// outlier channel of k is spread over its block, which is what lets two bits a channel hold it.
namespace twilight {

/// +1 or -1, the same for every layer, head and model: the top bit of SplitMix64's d-th output from
/// seed 0, set meaning -1.
[[nodiscard]] constexpr float rotation_sign(int d) {
  const std::uint64_t draw = splitmix64((static_cast<std::uint64_t>(d) + 1) * kSplitMixStep);
  return (draw >> 63) != 0 ? -1.0F : 1.0F;
}

/// Length of the block that starts at channel `begin` of D: the largest power of two that fits.
[[nodiscard]] constexpr int rotation_block(int head_dim, int begin) {
  int block = 1;
  while (2 * block <= head_dim - begin) block *= 2;
  return block;
}

/// x = R x, f32. Butterflies of distance 1, 2, 4, ... (a + b, a - b), then one multiplication by
/// f32(1 / sqrt(block)): the operations and their order are part of the format.
void rotate(std::span<float> x);

/// The inverse, R^T x.
void rotate_back(std::span<float> x);

}  // namespace twilight

#endif  // TWILIGHT_QUANT_ROTATION_H_
