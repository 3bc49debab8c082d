#ifndef TWILIGHT_BACKEND_REF_REF_ROWS_H_
#define TWILIGHT_BACKEND_REF_REF_ROWS_H_

#include <cstdint>
#include <cstring>
#include <span>

#include "core/float16.h"
#include "kvcache/paged_kv_view.h"

/// Rows of the cache and of weights as f32, whatever their dtype and alignment.
namespace twilight::ref {

inline float load_element(DType dtype, const std::byte* at) {
  if (dtype == DType::kF32) {
    float value = 0;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

inline void store_element(DType dtype, std::byte* at, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(at, &value, sizeof value);
    return;
  }
  const std::uint16_t bits = dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
  std::memcpy(at, &bits, sizeof bits);
}

inline void load_row(DType dtype, const std::byte* at, std::span<float> row) {
  for (float& value : row) {
    value = load_element(dtype, at);
    at += dtype_bytes(dtype);
  }
}

/// Address of one row [D] of a sequence's token.
inline const std::byte* k_row(const PagedKvView& kv, std::int64_t seq, std::int64_t token,
                              std::int64_t head) {
  return kv.k_rows(kv.page_of(seq, token / kv.page_size), head) +
         token % kv.page_size * kv.k.token_stride * dtype_bytes(kv.dtype);
}

inline const std::byte* v_row(const PagedKvView& kv, std::int64_t seq, std::int64_t token,
                              std::int64_t head) {
  return kv.v_rows(kv.page_of(seq, token / kv.page_size), head) +
         token % kv.page_size * kv.v.token_stride * dtype_bytes(kv.dtype);
}

inline double dot(const float* a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < b.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

}  // namespace twilight::ref

#endif  // TWILIGHT_BACKEND_REF_REF_ROWS_H_
