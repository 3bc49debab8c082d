#ifndef TWILIGHT_BACKEND_CUDA_DEVICE_ROTATE_CUH_
#define TWILIGHT_BACKEND_CUDA_DEVICE_ROTATE_CUH_

#include "quant/rotation.h"

namespace twilight::cuda {

/// 1 / sqrt(block), the f32 nearest to the exact number, as quant/rotation.cc has it.
__device__ inline float hadamard_norm(int block) {
  return static_cast<float>(1.0 / sqrt(static_cast<double>(block)));
}

/// x = R x for `rows` rows [D] of shared memory, `stride` floats apart, by all threads of the
/// block. The same operations in the same order as `rotate`.
__device__ inline void rotate_rows(float* x, int rows, int stride, int head_dim) {
  const int total = rows * head_dim;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    x[i / head_dim * stride + i % head_dim] *= rotation_sign(i % head_dim);
  }
  __syncthreads();
  for (int begin = 0; begin < head_dim;) {
    const int block = rotation_block(head_dim, begin);
    const int pairs = rows * (block / 2);
    for (int step = 1; step < block; step *= 2) {
      for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        const int pair = i % (block / 2);
        float* at = x + i / (block / 2) * stride + begin + pair / step * 2 * step + pair % step;
        const float a = at[0];
        const float b = at[step];
        at[0] = a + b;
        at[step] = a - b;
      }
      __syncthreads();
    }
    const float norm = hadamard_norm(block);
    for (int i = threadIdx.x; i < rows * block; i += blockDim.x) {
      x[i / block * stride + begin + i % block] *= norm;
    }
    __syncthreads();
    begin += block;
  }
}

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_DEVICE_ROTATE_CUH_
