#ifndef TWILIGHT_BACKEND_CUDA_DEVICE_REDUCE_CUH_
#define TWILIGHT_BACKEND_CUDA_DEVICE_REDUCE_CUH_

#include <cstdint>

/// Sums and maxima over a warp or a block, in one fixed order.
namespace twilight::cuda {

constexpr unsigned kFullMask = 0xffffffffU;

template <typename T, typename Op>
__device__ inline T warp_reduce(T value, const Op& op) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    value = op(value, __shfl_xor_sync(kFullMask, value, step));
  return value;
}

template <typename T>
struct Sum {
  __device__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// Over all threads of a block of whole warps, at most 1,024 threads; every thread gets the result.
/// `scratch` is shared memory of 32 values. Safe to call again at once.
template <typename T, typename Op>
__device__ inline T block_reduce(T value, const Op& op, T* scratch) {
  const int warp = threadIdx.x / 32;
  const int num_warps = blockDim.x / 32;
  value = warp_reduce(value, op);
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  T total = scratch[0];
  for (int i = 1; i < num_warps; ++i) total = op(total, scratch[i]);
  __syncthreads();
  return total;
}

/// Number of set flags in threads before this one, and in all. `scratch`: shared, 32 ints.
__device__ inline int block_rank(bool flag, int* total, int* scratch) {
  const int warp = threadIdx.x / 32;
  const int num_warps = blockDim.x / 32;
  const unsigned ballot = __ballot_sync(kFullMask, flag);
  const int before = __popc(ballot & ((1U << (threadIdx.x % 32)) - 1));
  if (threadIdx.x % 32 == 0) scratch[warp] = __popc(ballot);
  __syncthreads();
  int base = 0;
  int sum = 0;
  for (int i = 0; i < num_warps; ++i) {
    if (i < warp) base += scratch[i];
    sum += scratch[i];
  }
  __syncthreads();
  *total = sum;
  return base + before;
}

/// Unsigned key with the order of the floats: -0 as +0, NaN below everything.
__device__ inline std::uint32_t ordered_key(float x) {
  if (x != x) return 0;
  const std::uint32_t bits = __float_as_uint(x + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_DEVICE_REDUCE_CUH_
