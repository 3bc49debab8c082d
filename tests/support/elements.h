#ifndef TWILIGHT_TESTS_SUPPORT_ELEMENTS_H_
#define TWILIGHT_TESTS_SUPPORT_ELEMENTS_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/float16.h"
#include "twilight/types.h"

namespace twilight {

/// `value` as an element of that type holds it.
inline float round_to(float value, DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return bf16_to_f32(f32_to_bf16(value));
    case DType::kF16:
      return f16_to_f32(f32_to_f16(value));
    case DType::kF32:
      break;
  }
  return value;
}

/// Writes one element; `to` needs no alignment.
inline void store_element(std::byte* to, DType dtype, float value) {
  const std::uint16_t half = dtype == DType::kBf16 ? f32_to_bf16(value) : f32_to_f16(value);
  if (dtype == DType::kF32) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    std::memcpy(to, &half, sizeof(half));
  }
}

}  // namespace twilight

#endif  // TWILIGHT_TESTS_SUPPORT_ELEMENTS_H_
