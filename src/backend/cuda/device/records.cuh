#ifndef TWILIGHT_BACKEND_CUDA_DEVICE_RECORDS_CUH_
#define TWILIGHT_BACKEND_CUDA_DEVICE_RECORDS_CUH_

#include <cstdint>

#include <cuda_fp16.h>

#include "quant/code_place.h"
#include "quant/index_format.h"

/// Reading index records in device code, eight channels at a time, whatever the layout.
namespace twilight::cuda {

__device__ inline float load_f16(const std::byte* at) {
  return __half2float(*reinterpret_cast<const __half*>(at));
}

__device__ inline std::uint32_t load_word(const std::byte* at) {
  return *reinterpret_cast<const std::uint32_t*>(at);
}

__device__ inline const PageParams* page_params_of(const KeyIndexView& index, std::int64_t page,
                                                   std::int64_t head) {
  return reinterpret_cast<const PageParams*>(index.params + page * index.params_page_stride +
                                             head * index.params_head_stride);
}

/// Channels d .. d + 7 (d a multiple of 8) of a 4-bit mid-rise vector.
__device__ inline void decode_nibbles8(const std::byte* codes, float step, int d, float (&x)[8]) {
  const std::uint32_t word = load_word(codes + nibble_place(d).byte);
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    const unsigned code = word >> (8 * (b % 4) + (b >= 4 ? 4 : 0)) & 15U;
    x[b] = step * (static_cast<float>(code) - 7.5F);
  }
}

/// Codes of channels d .. d + 7 (d a multiple of 8) of tile token t: in every layout four
/// consecutive channels are the four bytes of a word, at one shift.
__device__ inline void load_codes8(IndexLayout layout, int bits, int head_dim, int t, int d,
                                   const std::byte* tile, float (&x)[8]) {
  const unsigned mask = (1U << bits) - 1U;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const CodePlace place = code_place(layout, bits, head_dim, t, d + 4 * half);
    const std::uint32_t word = load_word(tile + place.byte) >> place.shift;
#pragma unroll
    for (int b = 0; b < 4; ++b) x[4 * half + b] = static_cast<float>(word >> (8 * b) & mask);
  }
}

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_DEVICE_RECORDS_CUH_
