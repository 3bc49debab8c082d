#ifndef TWILIGHT_QUANT_CODE_PLACE_H_
#define TWILIGHT_QUANT_CODE_PLACE_H_

#include <cstdint>

#include "quant/index_format.h"

/// Where the code, scale and zero of a token lie in a tile of an estimate record. Plain arithmetic,
/// usable in device code.
namespace twilight {

struct CodePlace {
  std::int64_t byte = 0;
  int shift = 0;  ///< bits
};

/// Place of channel d of tile token t (0 to 15).
///
/// kMma order (2 and 4 bits, D a multiple of 32; 8 bits are as kTokenLanes): lane 4 g + q of a warp
/// owns channels [q D / 4, (q + 1) D / 4) of tokens g and g + 8, D / 8 bytes at 2 bits and D / 4 at
/// 4. With c the channel inside them, j = c / 8 the matrix instruction, h = c / 4 % 2 its half and
/// b = c % 4:
///   2 bits: lane byte 4 j + b, bits 2 (t / 8) + 4 h.
///   4 bits: lane byte 8 j + 4 h + b, low nibble token g, high g + 8.
/// Lane bytes lie in chunks of 16, chunk by chunk and inside a chunk lane by lane; the last chunk
/// of a lane has what is left: lane byte i is at 512 (i / 16) + w lane + i % 16, w its chunk's
/// width.
[[nodiscard]] constexpr CodePlace code_place(IndexLayout layout, int bits, int head_dim, int t,
                                             int d) {
  if (layout == IndexLayout::kMma && bits < 8) {
    const int c = d % (head_dim / 4);
    const int lane = 4 * (t % 8) + d / (head_dim / 4);
    const int high = t / 8;
    const int h = c / 4 % 2;
    const int i = bits == 2 ? c / 8 * 4 + c % 4 : c;
    const int left = head_dim * bits / 16 - i / 16 * 16;
    const int width = left < 16 ? left : 16;
    return {std::int64_t{512} * (i / 16) + std::int64_t{width} * lane + i % 16,
            bits == 2 ? 2 * high + 4 * h : 4 * high};
  }
  if (bits == 2) return {std::int64_t{d / 16} * 64 + 4 * t + d % 4, 2 * (d / 4 % 4)};
  if (bits == 4) return {std::int64_t{d / 8} * 64 + 4 * t + d % 4, d % 8 >= 4 ? 4 : 0};
  return {std::int64_t{d / 4} * 64 + 4 * t + d % 4, 0};
}

/// Offset of a token's f16 scale from the end of the codes. kMma puts what one lane loads together:
/// (scale g, scale g + 8) at 2 bits, (scale, zero) of g and then of g + 8 at 4 bits.
[[nodiscard]] constexpr int scale_place(IndexLayout layout, int bits, int t) {
  if (layout == IndexLayout::kMma && bits == 2) return 4 * (t % 8) + 2 * (t / 8);
  if (layout == IndexLayout::kMma && bits == 4) return 8 * (t % 8) + 4 * (t / 8);
  return 2 * t;
}

/// The same for a token's zero (4 and 8 bits).
[[nodiscard]] constexpr int zero_place(IndexLayout layout, int bits, int t) {
  if (layout == IndexLayout::kMma && bits == 4) return scale_place(layout, bits, t) + 2;
  return 2 * kEstimateTileTokens + 2 * t;
}

/// Byte and shift of channel d of a 4-bit vector (centroids, deviant residuals, value means).
[[nodiscard]] constexpr CodePlace nibble_place(int d) {
  return {std::int64_t{d / 8} * 4 + d % 4, d % 8 >= 4 ? 4 : 0};
}

}  // namespace twilight

#endif  // TWILIGHT_QUANT_CODE_PLACE_H_
