#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "core/float16.h"

// linear_kernel: tiles of 64 x 64 outputs, 16 columns of x and W at a time through shared memory, 4
// x 4 outputs a thread; f32 throughout, one order of summation for every shape of the batch. For
// weights the library cannot take and for full precision. Bound by f32 arithmetic. Tests:
// tests/cuda/model_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kDepth = 16;

/// An element at any byte address.
__device__ float load_weight(const WeightView& weight, std::int64_t i) {
  const int bytes = dtype_bytes(weight.dtype);
  const auto* at = reinterpret_cast<const unsigned char*>(weight.data) + i * bytes;
  std::uint32_t bits = at[0] | static_cast<std::uint32_t>(at[1]) << 8;
  if (bytes == 4) {
    bits |= static_cast<std::uint32_t>(at[2]) << 16 | static_cast<std::uint32_t>(at[3]) << 24;
    return __uint_as_float(bits);
  }
  const auto half = static_cast<std::uint16_t>(bits);
  return weight.dtype == DType::kF16 ? f16_to_f32(half) : bf16_to_f32(half);
}

__global__ void __launch_bounds__(kThreads)
    linear_kernel(const __grid_constant__ LinearParams params) {
  __shared__ float x_tile[kDepth][kTile + 4];
  __shared__ float w_tile[kDepth][kTile + 4];
  const WeightView& weight = params.weight;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kTile;
  const std::int64_t first_m = std::int64_t{blockIdx.y} * kTile;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  float sum[4][4] = {};
  for (std::int64_t k0 = 0; k0 < weight.cols; k0 += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int k = i % kDepth;
      const int r = i / kDepth;
      const bool inside = k0 + k < weight.cols;
      const std::int64_t m = first_m + r;
      const std::int64_t row = first_row + r;
      x_tile[k][r] = inside && m < params.num_rows ? params.x[m * params.x_stride + k0 + k] : 0.0F;
      w_tile[k][r] =
          inside && row < weight.rows ? load_weight(weight, row * weight.cols + k0 + k) : 0.0F;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          sum[a][b] = fmaf(x_tile[k][ty * 4 + a], w_tile[k][tx * 4 + b], sum[a][b]);
        }
      }
    }
    __syncthreads();
  }
  for (int a = 0; a < 4; ++a) {
    const std::int64_t m = first_m + ty * 4 + a;
    for (int b = 0; b < 4 && m < params.num_rows; ++b) {
      const std::int64_t row = first_row + tx * 4 + b;
      if (row >= weight.rows) break;
      float* y = params.y + m * params.y_stride + row;
      float value = sum[a][b];
      if (params.bias != nullptr) value += params.bias[row];
      *y = params.accumulate ? *y + value : value;
    }
  }
}

}  // namespace

void linear(const LinearParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const dim3 grid(static_cast<unsigned>((params.weight.rows + kTile - 1) / kTile),
                  static_cast<unsigned>((params.num_rows + kTile - 1) / kTile));
  linear_kernel<<<grid, kThreads, 0, stream>>>(params);
  check_launch("linear");
}

}  // namespace twilight::cuda::base
