#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/reduce.cuh"

// Small ops of the forward pass, f32. rms_norm_kernel: a block per row; the others: a thread per
// element or pair. Bound by bytes. Tests: tests/cuda/model_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams params) {
  __shared__ float scratch[32];
  for (std::int64_t row = blockIdx.x; row < params.num_rows; row += gridDim.x) {
    const float* x = params.x + row * params.hidden;
    float* y = params.y + row * params.hidden;
    float squares = 0;
    for (std::int64_t i = threadIdx.x; i < params.hidden; i += kThreads) {
      squares = fmaf(x[i], x[i], squares);
    }
    squares = block_reduce(squares, Sum<float>(), scratch);
    const float inverse = 1.0F / sqrtf(squares / static_cast<float>(params.hidden) + params.eps);
    for (std::int64_t i = threadIdx.x; i < params.hidden; i += kThreads) {
      y[i] = x[i] * inverse * params.weight[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ RopeParams params) {
  const int half = params.head_dim / 2;
  const std::int64_t per_token = std::int64_t{params.num_heads} * half;
  const std::int64_t total = params.num_tokens * per_token;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t token = i / per_token;
    const std::int64_t head = i % per_token / half;
    const std::int64_t d = i % half;
    float* x = params.x + token * params.token_stride + head * params.head_dim + d;
    const float c = params.cos[token * half + d];
    const float s = params.sin[token * half + d];
    const float a = x[0];
    const float b = x[half];
    x[0] = a * c - b * s;
    x[half] = b * c + a * s;
  }
}

__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const __grid_constant__ SiluMulParams params) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.count;
       i += std::int64_t{gridDim.x} * kThreads) {
    const float gate = params.gate[i];
    params.y[i] = gate / (1.0F + expf(-gate)) * params.up[i];
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  rms_norm_kernel<<<blocks_for(params.num_rows, 1, kMaxBlocks), kThreads, 0, stream>>>(params);
  check_launch("rms_norm");
}

void rope(const RopeParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const std::int64_t pairs =
      std::int64_t{params.num_tokens} * params.num_heads * (params.head_dim / 2);
  rope_kernel<<<blocks_for(pairs, kThreads, kMaxBlocks), kThreads, 0, stream>>>(params);
  check_launch("rope");
}

void silu_mul(const SiluMulParams& params, cudaStream_t stream) {
  if (params.count == 0) return;
  silu_mul_kernel<<<blocks_for(params.count, kThreads, kMaxBlocks), kThreads, 0, stream>>>(params);
  check_launch("silu_mul");
}

}  // namespace twilight::cuda::base
