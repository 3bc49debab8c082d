#ifndef TWILIGHT_BACKEND_CUDA_FAST_ROWS_LINEAR_H_
#define TWILIGHT_BACKEND_CUDA_FAST_ROWS_LINEAR_H_

#include <cstdint>

#include <cuda_runtime_api.h>

#include "twilight/types.h"

/// Products of few rows with large 16-bit matrices, bound by the bytes of the matrices, and the
/// small ops around them.
namespace twilight::cuda_fast {

inline constexpr int kMaxLinearRows = 64;

/// What becomes of a matrix's products. Matrices are row-major [rows, cols], 16-byte aligned.
struct RowsMatrix {
  enum class Use : std::int32_t {
    kStore,   ///< y = x W^T + bias, plus y itself where `accumulate`
    kRotate,  ///< rotated over heads, then stored
    kGate,    ///< act = silu(x W^T + bias) * (x up^T + up_bias), rounded to the matrices' dtype
  };
  Use use = Use::kStore;
  const void* w = nullptr;
  const float* bias = nullptr;
  std::int32_t rows = 0;
  bool accumulate = false;
  float* y = nullptr;
  std::int64_t y_stride = 0;
  const void* up = nullptr;
  const float* up_bias = nullptr;
  void* act = nullptr;  ///< [m, rows]
};

/// One launch: up to three matrices over the same x.
struct RowsArgs {
  RowsMatrix matrix[3];
  std::int32_t num_matrices = 0;
  std::int32_t m = 0;       ///< rows of x, up to kMaxLinearRows
  std::int32_t cols = 0;    ///< a multiple of 8
  const void* x = nullptr;  ///< [m, cols] in the matrices' dtype, 16-byte aligned rows
  std::int64_t x_stride = 0;
  const float* cos = nullptr;  ///< [m, half] for kRotate
  const float* sin = nullptr;
  std::int32_t half = 0;  ///< D / 2, a multiple of 8

  // Set by the launcher.
  std::int32_t first_tile[3] = {};
  std::int32_t num_tiles = 0;
};

/// Counts the tiles of 16 rows of args' matrices, 8 of `w` and 8 of `up` with a gate.
void number_tiles(RowsArgs& args);

/// A row's result depends on nothing but its x and the matrix: the same bits in any batch.
/// `clusters`: whether the device has them (sm_90).
void rows_linear(const RowsArgs& args, DType dtype, bool clusters, cudaStream_t stream);

/// `dependent` of the rest: see dependent.cuh. rms_norm of f32 rows, rounded to `dtype`; hidden is
/// a multiple of 4, x and weight 16-byte aligned.
void norm_rows(const float* x, const float* weight, float eps, std::int64_t rows,
               std::int64_t hidden, DType dtype, void* out, bool dependent, cudaStream_t stream);
/// f32 rows rounded to `dtype`, packed; cols is a multiple of 4.
void round_rows(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t cols,
                DType dtype, void* out, bool dependent, cudaStream_t stream);
/// silu(gate) * up rounded to `dtype`; count is a multiple of 4.
void gate_rows(const float* gate, const float* up, std::int64_t count, DType dtype, void* out,
               bool dependent, cudaStream_t stream);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_ROWS_LINEAR_H_
