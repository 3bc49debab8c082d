#ifndef TWILIGHT_TYPES_H_
#define TWILIGHT_TYPES_H_

#include <cstdint>
#include <string_view>

#include "twilight/export.h"

/// Axes, the same letters everywhere: B sequences, T tokens, Hq / Hkv query / KV heads, G = Hq /
/// Hkv, D head dimension, P page size in tokens, N tokens in a sequence's cache.
namespace twilight {

/// Element type of weights and of the KV cache.
enum class DType : std::int32_t { kF32 = 0, kF16 = 1, kBf16 = 2 };

/// Bytes of one element.
[[nodiscard]] constexpr int dtype_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

/// "f32", "f16" or "bf16".
[[nodiscard]] TWILIGHT_API std::string_view dtype_name(DType dtype);

/// Inverse of `dtype_name`; throws Error(kInvalidArgument) for another text.
[[nodiscard]] TWILIGHT_API DType parse_dtype(std::string_view name);

}  // namespace twilight

#endif  // TWILIGHT_TYPES_H_
