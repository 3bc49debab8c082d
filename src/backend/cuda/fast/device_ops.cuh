#ifndef TWILIGHT_BACKEND_CUDA_FAST_DEVICE_OPS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_DEVICE_OPS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

/// Instructions the fused kernels are built from, and conversions of 16-bit elements.
namespace twilight::cuda_fast {

using Bf16 = __nv_bfloat16;
using Half = __half;

inline constexpr unsigned kFullMask = 0xffffffffU;
inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 16 x 32 unsigned bytes times 32 x 8 signed bytes.
__device__ __forceinline__ void mma_u8s8(int& c0, int& c1, int& c2, int& c3, std::uint32_t a0,
                                         std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                                         std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c0), "+r"(c1), "+r"(c2), "+r"(c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename Element>
__device__ __forceinline__ void mma_16(float (&c)[4], std::uint32_t a0, std::uint32_t a1,
                                       std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                       std::uint32_t b1);
template <>
__device__ __forceinline__ void mma_16<Bf16>(float (&c)[4], std::uint32_t a0, std::uint32_t a1,
                                             std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                             std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16<Half>(float (&c)[4], std::uint32_t a0, std::uint32_t a1,
                                             std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                             std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename Element>
__device__ __forceinline__ Element to_element(float x);
template <>
__device__ __forceinline__ Bf16 to_element<Bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Half to_element<Half>(float x) {
  return __float2half_rn(x);
}
__device__ __forceinline__ float from_element(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float from_element(Half x) { return __half2float(x); }

/// Two elements in one register, `lo` in the low half.
template <typename Element>
__device__ __forceinline__ std::uint32_t pack_pair(float lo, float hi);
template <>
__device__ __forceinline__ std::uint32_t pack_pair<Bf16>(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ std::uint32_t pack_pair<Half>(float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
template <typename Element>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<Bf16>(std::uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000U));
}
template <>
__device__ __forceinline__ float2 unpack_pair<Half>(std::uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

/// Keeps an address in one pair of registers. Where the compiler sees how it was made it keeps a
/// base and an offset instead, and adds them for every load.
__device__ __forceinline__ void whole_address(const std::uint8_t*& at) {
  asm volatile("" : "+l"(at));
}

/// Reads of index and cache planes: once, past L1.
__device__ __forceinline__ uint4 load_stream16(const std::uint8_t* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}
__device__ __forceinline__ uint2 load_stream8(const std::uint8_t* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(at));
  return v;
}
__device__ __forceinline__ std::uint32_t load_stream4(const std::uint8_t* at) {
  std::uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}
__device__ __forceinline__ std::uint32_t load_stream2(const std::uint8_t* at) {
  std::uint32_t v;  // a 16-bit register would have to be widened, which waits for the load
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}

/// Asks for the 128-byte line of an address, into L2.
__device__ __forceinline__ void prefetch_line(const std::uint8_t* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

/// kWords consecutive 32-bit words in one load.
template <int kWords>
struct Words {
  std::uint32_t w[kWords];
};
template <int kWords>
__device__ __forceinline__ Words<kWords> load_words(const std::uint8_t* at) {
  Words<kWords> out;
  if constexpr (kWords == 4) {
    const uint4 v = load_stream16(at);
    out.w[0] = v.x, out.w[1] = v.y, out.w[2] = v.z, out.w[3] = v.w;
  } else {
    const uint2 v = load_stream8(at);
    out.w[0] = v.x, out.w[1] = v.y;
  }
  return out;
}

template <int kWords>
__device__ __forceinline__ Words<kWords> shared_words(const std::uint8_t* at) {
  Words<kWords> out;
  if constexpr (kWords == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(at);
    out.w[0] = v.x, out.w[1] = v.y, out.w[2] = v.z, out.w[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    out.w[0] = v.x, out.w[1] = v.y;
  }
  return out;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}
/// Over the eight lanes g of lane = 4 g + t, t fixed.
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
__device__ __forceinline__ float column_max(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

/// Inclusive prefix sum over the warp.
__device__ __forceinline__ std::uint32_t warp_prefix(std::uint32_t x) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::uint32_t other = __shfl_up_sync(kFullMask, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// --- clusters ---------------------------------------------------------------------------------
// A problem is served by kCluster blocks. With 1 every function is its block-wide counterpart.

template <int kCluster>
__device__ __forceinline__ int cluster_rank() {
  if constexpr (kCluster == 1) return 0;
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

template <int kCluster>
__device__ __forceinline__ void cluster_sync() {
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
}

/// Address in block `rank`'s shared memory of what `local` points at in ours.
__device__ __forceinline__ std::uint32_t remote_address(const void* local, int rank) {
  std::uint32_t address = static_cast<std::uint32_t>(__cvta_generic_to_shared(local));
#if __CUDA_ARCH__ >= 900
  std::uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  return address;
#endif
}

template <int kCluster>
__device__ __forceinline__ void put_u32(std::uint32_t* local, int rank, std::uint32_t value) {
  if constexpr (kCluster == 1) {
    *local = value;
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_address(local, rank)), "r"(value)
                 : "memory");
#endif
  }
}
template <int kCluster>
__device__ __forceinline__ void put_float(float* local, int rank, float value) {
  put_u32<kCluster>(reinterpret_cast<std::uint32_t*>(local), rank, __float_as_uint(value));
}
template <int kCluster>
__device__ __forceinline__ void put_float2(float2* local, int rank, float2 value) {
  if constexpr (kCluster == 1) {
    *local = value;
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote_address(local, rank)),
                 "f"(value.x), "f"(value.y)
                 : "memory");
#endif
  }
}
template <int kCluster>
__device__ __forceinline__ void add_u32(std::uint32_t* local, int rank, std::uint32_t value) {
  if constexpr (kCluster == 1) {
    atomicAdd(local, value);
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(remote_address(local, rank)),
        "r"(value)
        : "memory");
#endif
  }
}
template <int kCluster>
__device__ __forceinline__ void max_u32(std::uint32_t* local, int rank, std::uint32_t value) {
  if constexpr (kCluster == 1) {
    atomicMax(local, value);
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "red.relaxed.cluster.shared::cluster.max.u32 [%0], %1;" ::"r"(remote_address(local, rank)),
        "r"(value)
        : "memory");
#endif
  }
}
template <int kCluster>
__device__ __forceinline__ std::uint32_t get_u32(const std::uint32_t* local, int rank) {
  if constexpr (kCluster == 1) {
    return *local;
  } else {
    std::uint32_t value = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(remote_address(local, rank))
                 : "memory");
#endif
    return value;
  }
}

__device__ __forceinline__ std::int64_t nanoseconds() {
  std::int64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_DEVICE_OPS_CUH_
