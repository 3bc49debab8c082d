#ifndef TWILIGHT_BACKEND_CPU_KERNELS_BLOCKS_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_BLOCKS_H_

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "core/buffer.h"
#include "ops/params.h"

namespace twilight::cpu {

/// Up to this many rows meet the blocks themselves, as bytes; more go through oneDNN unless they
/// must be row-invariant. Measured: docs/kernels/blocks.md.
inline constexpr std::int32_t kBlockMatvecMaxRows = 16;

/// Bytes of one row of activations as `quantise` writes it: the codes, then two arrays of
/// `cols` / 16 words (scales, sums), each on a boundary of a buffer. What the arrays hold is
/// between `quantise` and `matvec` of one instruction set.
[[nodiscard]] constexpr std::int64_t block_input_bytes(std::int64_t cols) {
  return static_cast<std::int64_t>(align_up(static_cast<std::size_t>(cols)) +
                                   2 * align_up(static_cast<std::size_t>(cols / 16) * 4));
}

/// One row of activations, [cols], cols a multiple of 32.
struct BlockInput {
  std::int8_t* codes;
  float* scales;
  float* sums;

  BlockInput() = default;
  BlockInput(std::byte* row, std::int64_t cols)
      : codes(reinterpret_cast<std::int8_t*>(row)),
        scales(reinterpret_cast<float*>(row + align_up(static_cast<std::size_t>(cols)))),
        sums(reinterpret_cast<float*>(row + align_up(static_cast<std::size_t>(cols)) +
                                      align_up(static_cast<std::size_t>(cols / 16) * 4))) {}
};

/// Products with weights in quantised blocks: no threading, and no value depends on how the range
/// was cut or on the other rows of activations.
struct BlockKernels {
  /// One row of activations as bytes: 32 at a time, step = max |x| / 127, rounded to nearest even.
  /// A block whose largest magnitude is below 2^-100 is zero; one that holds NaN or infinity makes
  /// every product with it NaN.
  void (*quantise)(WeightType type, const float* x, std::int64_t cols, std::byte* out);
  /// Output rows [begin, end) of a linear layer whose rows of activations are in `inputs`, a row
  /// each block_input_bytes(cols). Reads each weight once from memory.
  void (*matvec)(const LinearParams& params, const std::byte* inputs, std::int64_t begin,
                 std::int64_t end);
  /// `count` weights, whole blocks, bit for bit as dequantise_row gives them.
  void (*dequantise)(WeightType type, const std::byte* blocks, std::int64_t count, float* out);
};

TWILIGHT_DECLARE_KERNELS(BlockKernels, block_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_BLOCKS_H_
