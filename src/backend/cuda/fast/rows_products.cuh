#ifndef TWILIGHT_BACKEND_CUDA_FAST_ROWS_PRODUCTS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_ROWS_PRODUCTS_CUH_

#include <type_traits>

#include "backend/cuda/fast/device_ops.cuh"
#include "backend/cuda/fast/rows_linear.h"
#include "backend/cuda/fast/stages.cuh"

/// Products of 16 rows of a matrix with few rows of x, and what becomes of their sums. Rows 8 to 15
/// of a tile are the partners of rows 0 to 7: the next eight, the other halves of a head that is
/// rotated, or the rows of `up`.
namespace twilight::cuda_fast {

inline constexpr int kTileRows = 16;
inline constexpr int kStageColumns = 64;
inline constexpr int kPieces = kStageColumns / 8;
inline constexpr float kF16Largest = 65504.0F;

template <typename E>
__device__ __forceinline__ std::uint32_t round_pair(float lo, float hi) {
  if constexpr (sizeof(E) == 2 && !std::is_same_v<E, Bf16>) {
    lo = lo > kF16Largest ? kF16Largest : lo < -kF16Largest ? -kF16Largest : lo;
    hi = hi > kF16Largest ? kF16Largest : hi < -kF16Largest ? -kF16Largest : hi;
  }
  return pack_pair<E>(lo, hi);
}

/// Bias, rotation, gate and residual of two sums of row n of x: matrix rows `a` and `b`. What it
/// adds to may have been written by another block of the same launch. Returns what it stored in y.
template <typename E>
__device__ __forceinline__ float2 finish(const RowsArgs& args, const RowsMatrix& matrix, int n,
                                         int a, int b, float va, float vb) {
  const bool has_a = a < matrix.rows;
  if (matrix.bias != nullptr && has_a) va += matrix.bias[a];
  if (matrix.use == RowsMatrix::Use::kGate) {
    if (!has_a) return {};
    if (matrix.up_bias != nullptr) vb += matrix.up_bias[a];
    const float value = va / (1.0F + expf(-va)) * vb;
    const std::uint32_t pair = round_pair<E>(value, 0.0F);
    static_cast<std::uint16_t*>(matrix.act)[std::int64_t{n} * matrix.rows + a] =
        static_cast<std::uint16_t>(pair);
    return {};
  }
  const bool has_b = b < matrix.rows;
  if (matrix.bias != nullptr && has_b) vb += matrix.bias[b];
  if (matrix.use == RowsMatrix::Use::kRotate) {
    const int d = a % (2 * args.half);
    const float c = args.cos[n * args.half + d];
    const float s = args.sin[n * args.half + d];
    const float turned = va * c - vb * s;
    vb = vb * c + va * s;
    va = turned;
  }
  float* y = matrix.y + n * matrix.y_stride;
  if (matrix.accumulate) {
    if (has_a) va += __ldcg(y + a);
    if (has_b) vb += __ldcg(y + b);
  }
  if (has_a) y[a] = va;
  if (has_b) y[b] = vb;
  return make_float2(va, vb);
}

/// Where a tile's rows come from.
struct Tile {
  const RowsMatrix* matrix;
  int a;  ///< first of rows 0 to 7
  int b;  ///< first of rows 8 to 15
};

__device__ __forceinline__ Tile tile_of(const RowsArgs& args, int number) {
  const int which = args.num_matrices > 2 && number >= args.first_tile[2]   ? 2
                    : args.num_matrices > 1 && number >= args.first_tile[1] ? 1
                                                                            : 0;
  const RowsMatrix& matrix = args.matrix[which];
  const int tile = number - args.first_tile[which];
  if (matrix.use == RowsMatrix::Use::kGate) return {&matrix, 8 * tile, 8 * tile};
  if (matrix.use == RowsMatrix::Use::kRotate) {
    const int tiles = args.half / 8;
    const int a = tile / tiles * 2 * args.half + tile % tiles * 8;
    return {&matrix, a, a + args.half};
  }
  return {&matrix, 16 * tile, 16 * tile + 8};
}

/// Where row `row` of a tile lies; the last tile's, and its matrix's last row, beyond the end.
__device__ __forceinline__ const std::uint8_t* weight_row(const RowsArgs& args, int number,
                                                          int row) {
  const Tile tile = tile_of(args, min(number, args.num_tiles - 1));
  const RowsMatrix& m = *tile.matrix;
  const bool partner = row >= 8;
  const void* w = partner && m.use == RowsMatrix::Use::kGate ? m.up : m.w;
  const int r = min((partner ? tile.b - 8 : tile.a) + row, m.rows - 1);
  return static_cast<const std::uint8_t*>(w) + 2 * (std::int64_t{r} * args.cols);
}

/// Adds a stage's products to the sums of tile `tile`: its weights [tiles, 16, 64] and 8 kColumns
/// rows of x lie in shared memory. Sum k of a lane 4 g + t is row g + 8 (k / 2) with row
/// 8 j + 2 t + k % 2 of x.
template <typename E, int kColumns>
__device__ __forceinline__ void multiply_stage(float (&sum)[kColumns][4], std::uint32_t weights,
                                               std::uint32_t x, int tile, int lane) {
  const int matrix = lane / 8;
  const int row = lane % 8;
#pragma unroll
  for (int step = 0; step < kStageColumns / 16; step += 2) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      load_matrices(a[s], weights + piece_at<kPieces>(kTileRows * tile + 8 * (matrix % 2) + row,
                                                      2 * (step + s) + matrix / 2));
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      // Both steps of eight rows of x.
      std::uint32_t b[4];
      load_matrices(b, x + piece_at<kPieces>(8 * j + row, 2 * step + matrix));
      mma_16<E>(sum[j], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
      mma_16<E>(sum[j], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
    }
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_ROWS_PRODUCTS_CUH_
