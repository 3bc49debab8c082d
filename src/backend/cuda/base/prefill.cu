#include <cmath>

#include "backend/cuda/base/attend_args.h"
#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/elements.cuh"
#include "backend/cuda/device/reduce.cuh"

// attend_prefill_kernel: a block takes 32 query tokens of one head and walks the keys they see in
// tiles of 32 under an online softmax; f32 products. 8 threads share a pair of query rows: each has
// 4 of a tile's scores of both, and every eighth run of 4 output channels.
// Shared memory: queries, one tile of keys and then of values, weights. Bound by f32 arithmetic.
// Tests: tests/cuda/attend_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 32;
constexpr int kKeys = 32;
constexpr int kWeightStride = kKeys + 1;

[[nodiscard]] constexpr int row_stride(int head_dim) { return (head_dim + 31) / 32 * 32 + 4; }
[[nodiscard]] constexpr std::size_t shared_bytes(int head_dim) {
  return static_cast<std::size_t>((kRows + kKeys) * row_stride(head_dim) + kRows * kWeightStride) *
         sizeof(float);
}

/// Sum of or maximum over the 8 threads of a pair of rows.
template <typename Op>
__device__ float reduce8(float x, const Op& op) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

template <typename T, int kRuns>
__global__ void __launch_bounds__(kThreads)
    attend_prefill_kernel(const __grid_constant__ AttendPrefillParams params) {
  extern __shared__ __align__(16) float shared[];
  const PagedKvView& kv = params.kv;
  const int head_dim = kv.head_dim;
  const int stride = row_stride(head_dim);
  float* queries = shared;
  float* tile = queries + kRows * stride;
  float* weights = tile + kKeys * stride;
  const int head = blockIdx.y;
  const int kv_head = head / (params.num_q_heads / kv.num_kv_heads);
  const int first = blockIdx.x * kRows;
  const std::int64_t before = kv.seq_lens[0] - params.num_tokens;
  const float scale = params.scale * kLog2E;
  for (int i = threadIdx.x; i < kRows * stride; i += kThreads) {
    const int d = i % stride;
    const int token = first + i / stride;
    queries[i] = d < head_dim && token < params.num_tokens
                     ? params.q[token * params.q_token_stride + head * head_dim + d] * scale
                     : 0.0F;
  }
  const int pair = static_cast<int>(threadIdx.x) / 8 * 2;
  const int lane = static_cast<int>(threadIdx.x) % 8;
  float acc[2][kRuns * 4] = {};
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  const std::int64_t keys_end = before + min(first + kRows, params.num_tokens);
  const auto load_tile = [&](const PagePlane& plane, std::int64_t key0) {
    __syncthreads();
    for (int i = threadIdx.x; i < kKeys * stride; i += kThreads) {
      const int d = i % stride;
      const std::int64_t key = key0 + i / stride;
      tile[i] = d < head_dim && key < keys_end
                    ? to_f32(row_of<T>(kv, plane, kv.page_of(0, key / kv.page_size), kv_head,
                                       key % kv.page_size)[d])
                    : 0.0F;
    }
    __syncthreads();
  };
  for (std::int64_t key0 = 0; key0 < keys_end; key0 += kKeys) {
    load_tile(kv.k, key0);
    float score[2][4] = {};
    for (int d = 0; d < head_dim; d += 4) {
      float4 q[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        q[r] = *reinterpret_cast<const float4*>(queries + (pair + r) * stride + d);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 k = *reinterpret_cast<const float4*>(tile + (lane + 8 * j) * stride + d);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          score[r][j] = fmaf(q[r].x, k.x, score[r][j]);
          score[r][j] = fmaf(q[r].y, k.y, score[r][j]);
          score[r][j] = fmaf(q[r].z, k.z, score[r][j]);
          score[r][j] = fmaf(q[r].w, k.w, score[r][j]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (key0 + lane + 8 * j > before + first + pair + r) score[r][j] = -INFINITY;
        largest = fmaxf(largest, score[r][j]);
      }
      largest = fmaxf(top[r], reduce8(largest, Max()));
      const float shift = largest == -INFINITY ? 0.0F : largest;
      const float factor = exp2f(top[r] - shift);
      top[r] = largest;
      float added = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = exp2f(score[r][j] - shift);
        added += weight;
        weights[(pair + r) * kWeightStride + lane + 8 * j] = weight;
      }
      sum[r] = sum[r] * factor + reduce8(added, Sum<float>());
#pragma unroll
      for (int i = 0; i < kRuns * 4; ++i) acc[r][i] *= factor;
    }
    load_tile(kv.v, key0);
    for (int key = 0; key < kKeys; ++key) {
      const float w0 = weights[pair * kWeightStride + key];
      const float w1 = weights[(pair + 1) * kWeightStride + key];
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        if (run * 32 >= head_dim) break;
        const float4 v =
            *reinterpret_cast<const float4*>(tile + key * stride + run * 32 + lane * 4);
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[0][run * 4 + i] = fmaf(w0, values[i], acc[0][run * 4 + i]);
          acc[1][run * 4 + i] = fmaf(w1, values[i], acc[1][run * 4 + i]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = first + pair + r;
    if (token >= params.num_tokens) continue;
    float* out = params.out + token * params.out_token_stride + head * head_dim;
#pragma unroll
    for (int i = 0; i < kRuns * 4; ++i) {
      const int d = i / 4 * 32 + lane * 4 + i % 4;
      if (d < head_dim) out[d] = acc[r][i] / sum[r];
    }
  }
}

template <typename T, int kRuns>
void launch(const AttendPrefillParams& params, cudaStream_t stream) {
  const std::size_t bytes = shared_bytes(params.kv.head_dim);
  TWILIGHT_CUDA(cudaFuncSetAttribute(attend_prefill_kernel<T, kRuns>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes(kMaxHeadDim))));
  const dim3 grid(static_cast<unsigned>((params.num_tokens + kRows - 1) / kRows),
                  static_cast<unsigned>(params.num_q_heads));
  attend_prefill_kernel<T, kRuns><<<grid, kThreads, bytes, stream>>>(params);
}

}  // namespace

void attend_prefill(const AttendPrefillParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  for_dtype(params.kv.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    if (params.kv.head_dim <= 128) {
      launch<T, 4>(params, stream);
    } else {
      launch<T, 8>(params, stream);
    }
  });
  check_launch("attend_prefill");
}

}  // namespace twilight::cuda::base
