#ifndef TWILIGHT_QUANT_WEIGHT_BLOCKS_H_
#define TWILIGHT_QUANT_WEIGHT_BLOCKS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "twilight/types.h"

/// Weight matrices as GGUF files store them: rows of blocks, byte layout in docs/formats.md.
namespace twilight {

// NOLINTBEGIN(readability-identifier-naming): names of GGUF
/// Element type of a weight matrix. The values are the type numbers of GGUF.
enum class WeightType : std::int32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBf16 = 30,
};
// NOLINTEND(readability-identifier-naming)

/// Whether the number is one of the enumerators.
[[nodiscard]] constexpr bool is_weight_type(std::int64_t value) {
  return (value >= 0 && value <= 3) || (value >= 6 && value <= 8) || (value >= 10 && value <= 14) ||
         value == 30;
}

[[nodiscard]] constexpr bool is_quantised(WeightType type) {
  return type != WeightType::kF32 && type != WeightType::kF16 && type != WeightType::kBf16;
}

/// Weights in a block: 1, 32 or 256. A row is whole blocks.
[[nodiscard]] constexpr int weight_block_length(WeightType type) {
  if (!is_quantised(type)) return 1;
  return type >= WeightType::kQ2_K ? 256 : 32;
}

/// Bytes of a block.
[[nodiscard]] constexpr int weight_block_bytes(WeightType type) {
  switch (type) {
    case WeightType::kF32:
      return 4;
    case WeightType::kF16:
    case WeightType::kBf16:
      return 2;
    case WeightType::kQ4_0:
      return 18;
    case WeightType::kQ4_1:
      return 20;
    case WeightType::kQ5_0:
      return 22;
    case WeightType::kQ5_1:
      return 24;
    case WeightType::kQ8_0:
      return 34;
    case WeightType::kQ2_K:
      return 84;
    case WeightType::kQ3_K:
      return 110;
    case WeightType::kQ4_K:
      return 144;
    case WeightType::kQ5_K:
      return 176;
    case WeightType::kQ6_K:
      return 210;
  }
  return 0;
}

/// Bytes of a row of `cols` weights, a multiple of the block length.
[[nodiscard]] constexpr std::int64_t weight_row_bytes(WeightType type, std::int64_t cols) {
  return cols / weight_block_length(type) * weight_block_bytes(type);
}

/// The type with the elements of `dtype`.
[[nodiscard]] constexpr WeightType weight_type(DType dtype) {
  if (dtype == DType::kF32) return WeightType::kF32;
  return dtype == DType::kF16 ? WeightType::kF16 : WeightType::kBf16;
}

/// "F32", "Q4_K" and so on, as GGUF spells them.
[[nodiscard]] std::string_view weight_type_name(WeightType type);

/// The weights of one row, exact to one rounding to f32: the reference of every fast version. `row`
/// may be unaligned. Throws Error(kInvalidArgument) unless values.size() is whole blocks.
/// Thread-safe.
void dequantise_row(WeightType type, const std::byte* row, std::span<float> values);

}  // namespace twilight

#endif  // TWILIGHT_QUANT_WEIGHT_BLOCKS_H_
