#ifndef TWILIGHT_MODEL_GGUF_SCALAR_H_
#define TWILIGHT_MODEL_GGUF_SCALAR_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "model/gguf.h"

namespace twilight {

inline constexpr std::string_view kGgufWhere = "gguf";

/// Little-endian unsigned integer of 1 to 8 bytes.
[[nodiscard]] inline std::uint64_t load_little(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    value |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  }
  return value;
}

[[nodiscard]] inline std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Bytes of a value, 0 for strings and arrays.
[[nodiscard]] constexpr std::uint64_t gguf_scalar_bytes(GgufType type) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kI8:
    case GgufType::kBool:
      return 1;
    case GgufType::kU16:
    case GgufType::kI16:
      return 2;
    case GgufType::kU32:
    case GgufType::kI32:
    case GgufType::kF32:
      return 4;
    case GgufType::kU64:
    case GgufType::kI64:
    case GgufType::kF64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  return 0;
}

}  // namespace twilight

#endif  // TWILIGHT_MODEL_GGUF_SCALAR_H_
