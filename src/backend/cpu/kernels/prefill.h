#ifndef TWILIGHT_BACKEND_CPU_KERNELS_PREFILL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_PREFILL_H_

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "twilight/types.h"

namespace twilight::cpu {

/// One tile of the online softmax. Row r belongs to token r / group of the tile and sees the first
/// clamp(first_visible + r / group, 0, cols) columns. All rows are dense: row r of a matrix of c
/// columns starts at r * c.
struct SoftmaxTile {
  const float* scores = nullptr;  ///< [rows, cols] q.k, not scaled
  /// [rows, cols] bf16 or f32, exp2(score * scale_log2 - max); 0 where masked. The f32 form may be
  /// `scores` itself.
  void* weights = nullptr;
  float* out = nullptr;  ///< [rows, head_dim] running sum of weights times V; rescaled here
  float* max = nullptr;  ///< [rows] running maximum of score * scale_log2, -inf at the start
  float* sum = nullptr;  ///< [rows] running sum of the weights as stored, 0 at the start
  std::int64_t first_visible = 0;  ///< may be negative or past cols
  std::int32_t rows = 0;
  std::int32_t cols = 0;      ///< a multiple of 32
  std::int32_t head_dim = 0;  ///< a multiple of 16
  std::int32_t group = 1;     ///< G
  float scale_log2 = 0;       ///< softmax scale times log2(e), > 0
};

struct PrefillKernels {
  /// Converts `count` elements of a dtype, at any address, rounding to nearest even. NaN stays NaN.
  void (*to_bf16)(const std::byte* in, DType dtype, std::int64_t count, std::uint16_t* out);
  void (*to_f32)(const std::byte* in, DType dtype, std::int64_t count, float* out);
  void (*softmax_bf16)(const SoftmaxTile& tile);
  void (*softmax_f32)(const SoftmaxTile& tile);
};

TWILIGHT_DECLARE_KERNELS(PrefillKernels, prefill_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_PREFILL_H_
