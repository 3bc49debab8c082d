#ifndef TWILIGHT_BACKEND_CUDA_BASE_LAUNCH_H_
#define TWILIGHT_BACKEND_CUDA_BASE_LAUNCH_H_

#include <algorithm>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kvcache/paged_kv_view.h"

namespace twilight::cuda::base {

/// Blocks for `items` pieces of work, at most `most`; kernels stride over the rest.
[[nodiscard]] inline unsigned blocks_for(std::int64_t items, std::int64_t per_block,
                                         std::int64_t most) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((items + per_block - 1) / per_block, 1, most));
}

/// Whether every row of a plane starts at a multiple of 16 bytes.
[[nodiscard]] inline bool aligned_rows(const PagePlane& plane, DType dtype) {
  const std::int64_t unit = 16 / dtype_bytes(dtype);
  return reinterpret_cast<std::uintptr_t>(plane.data) % 16 == 0 && plane.page_stride % unit == 0 &&
         plane.head_stride % unit == 0 && plane.token_stride % unit == 0;
}

/// Calls `body` with a null pointer of the C++ type that holds a dtype.
template <typename Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body(static_cast<const float*>(nullptr));
    case DType::kF16:
      return body(static_cast<const __half*>(nullptr));
    case DType::kBf16:
      return body(static_cast<const __nv_bfloat16*>(nullptr));
  }
}

}  // namespace twilight::cuda::base

#endif  // TWILIGHT_BACKEND_CUDA_BASE_LAUNCH_H_
