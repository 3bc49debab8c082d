#ifndef TWILIGHT_BACKEND_CUDA_DEVICE_ELEMENTS_CUH_
#define TWILIGHT_BACKEND_CUDA_DEVICE_ELEMENTS_CUH_

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/float16.h"
#include "kvcache/paged_kv_view.h"

/// Elements of the cache and of weights as f32.
namespace twilight::cuda {

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(__half x) { return __half2float(x); }
__device__ inline float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

/// The two halves of a word.
template <typename T>
__device__ inline float2 unpack2(std::uint32_t word);
template <>
__device__ inline float2 unpack2<__half>(std::uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ inline float2 unpack2<__nv_bfloat16>(std::uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000U)};
}

/// Eight elements still in the cache's dtype; `aligned` where the address is a multiple of 16
/// bytes.
template <typename T>
struct Raw8 {
  uint4 words;

  __device__ void load(const T* at, bool aligned) {
    if (aligned) {
      words = __ldg(reinterpret_cast<const uint4*>(at));
      return;
    }
    const auto* half = reinterpret_cast<const unsigned short*>(at);
    words.x = half[0] | static_cast<unsigned>(half[1]) << 16;
    words.y = half[2] | static_cast<unsigned>(half[3]) << 16;
    words.z = half[4] | static_cast<unsigned>(half[5]) << 16;
    words.w = half[6] | static_cast<unsigned>(half[7]) << 16;
  }
  __device__ void clear() { words = {0, 0, 0, 0}; }
  __device__ void get(float (&x)[8]) const {
    const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct Raw8<float> {
  float x[8];

  __device__ void load(const float* at, bool aligned) {
    if (aligned) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(at) + i);
        x[4 * i] = four.x;
        x[4 * i + 1] = four.y;
        x[4 * i + 2] = four.z;
        x[4 * i + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = at[i];
  }
  __device__ void clear() {
#pragma unroll
    for (float& value : x) value = 0;
  }
  __device__ void get(float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = x[i];
  }
};

/// Address of a token's row.
template <typename T>
__device__ inline const T* row_of(const PagedKvView& kv, const PagePlane& plane, std::int64_t page,
                                  std::int64_t head, std::int64_t slot) {
  return reinterpret_cast<const T*>(plane.data) + page * plane.page_stride +
         head * plane.head_stride + slot * plane.token_stride;
}

/// Rounds as core/float16.h does, NaN included.
template <typename T>
__device__ inline void store_element(T* at, float value) {
  if constexpr (sizeof(T) == 4) {
    *at = value;
  } else if constexpr (std::is_same_v<T, __half>) {
    *reinterpret_cast<std::uint16_t*>(at) = f32_to_f16(value);
  } else {
    *reinterpret_cast<std::uint16_t*>(at) = f32_to_bf16(value);
  }
}

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_DEVICE_ELEMENTS_CUH_
