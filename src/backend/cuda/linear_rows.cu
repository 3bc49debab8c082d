#include "backend/cuda/base/launch.h"
#include "backend/cuda/cublas_linear.h"
#include "backend/cuda/cuda_check.h"
#include "core/float16.h"

namespace twilight::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;
constexpr float kF16Largest = 65504.0F;

__device__ float rounded(float x, const float*) { return x; }
__device__ __half rounded(float x, const __half*) {
  return __float2half_rn(x > kF16Largest ? kF16Largest : x < -kF16Largest ? -kF16Largest : x);
}
__device__ __nv_bfloat16 rounded(float x, const __nv_bfloat16*) { return __float2bfloat16_rn(x); }

template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_rows_kernel(const float* x, std::int64_t x_stride, std::int64_t m, std::int64_t cols,
                      std::int64_t total, T* out) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t row = i / cols;
    out[i] = rounded(row < m ? x[row * x_stride + i % cols] : 0.0F, out);
  }
}

__global__ void __launch_bounds__(kThreads)
    finish_rows_kernel(const float* product, std::int64_t total, std::int64_t rows,
                       const float* bias, bool accumulate, float* y, std::int64_t y_stride) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    float* at = y + i / rows * y_stride + i % rows;
    float value = product[i];
    if (bias != nullptr) value += bias[i % rows];
    *at = accumulate ? *at + value : value;
  }
}

}  // namespace

void round_rows(const float* x, std::int64_t x_stride, std::int64_t m, std::int64_t padded_m,
                std::int64_t cols, DType dtype, void* out, cudaStream_t stream) {
  const std::int64_t total = padded_m * cols;
  base::for_dtype(dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    round_rows_kernel<T><<<base::blocks_for(total, kThreads, kMaxBlocks), kThreads, 0, stream>>>(
        x, x_stride, m, cols, total, static_cast<T*>(out));
  });
  check_launch("round_rows");
}

void finish_rows(const float* product, std::int64_t m, std::int64_t rows, const float* bias,
                 bool accumulate, float* y, std::int64_t y_stride, cudaStream_t stream) {
  const std::int64_t total = m * rows;
  finish_rows_kernel<<<base::blocks_for(total, kThreads, kMaxBlocks), kThreads, 0, stream>>>(
      product, total, rows, bias, accumulate, y, y_stride);
  check_launch("finish_rows");
}

}  // namespace twilight::cuda
