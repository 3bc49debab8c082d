#ifndef TWILIGHT_BACKEND_CUDA_FAST_KV_ROWS_H_
#define TWILIGHT_BACKEND_CUDA_FAST_KV_ROWS_H_

#include <cstdint>

#include "kvcache/paged_kv_view.h"

namespace twilight::cuda_fast {

/// Keys and values of a 16-bit cache by byte, for kernels' arguments.
struct KvRows {
  const std::uint8_t* k = nullptr;
  const std::uint8_t* v = nullptr;
  std::int64_t k_head_bytes = 0, k_page_bytes = 0, k_token_bytes = 0;
  std::int64_t v_head_bytes = 0, v_page_bytes = 0, v_token_bytes = 0;

  KvRows() = default;
  explicit KvRows(const PagedKvView& kv)
      : k(reinterpret_cast<const std::uint8_t*>(kv.k.data)),
        v(reinterpret_cast<const std::uint8_t*>(kv.v.data)),
        k_head_bytes(kv.k.head_stride * 2),
        k_page_bytes(kv.k.page_stride * 2),
        k_token_bytes(kv.k.token_stride * 2),
        v_head_bytes(kv.v.head_stride * 2),
        v_page_bytes(kv.v.page_stride * 2),
        v_token_bytes(kv.v.token_stride * 2) {}
};

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_KV_ROWS_H_
