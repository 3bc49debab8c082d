#include <cstddef>
#include <cstdint>
#include <span>

#include "model/gguf.h"
#include "twilight/error.h"

// Headers from arbitrary bytes: only twilight::Error may come out, and every range that is accepted
// must lie inside the input.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  const auto inside = [&](const std::byte* begin, std::size_t length) {
    return length == 0 || (begin >= bytes.data() && length <= size &&
                           static_cast<std::size_t>(begin - bytes.data()) <= size - length);
  };
  try {
    const twilight::GgufHeader header = twilight::parse_gguf(bytes, "fuzz");
    for (const auto& [key, value] : header.metadata) {
      if (key.empty() || !inside(value.bytes.data(), value.bytes.size())) __builtin_trap();
      if (value.shown().find('\n') != std::string::npos) __builtin_trap();
    }
    for (const auto& tensor : header.tensors) {
      if (tensor.begin < 24 || tensor.bytes < 0 || tensor.begin > static_cast<std::int64_t>(size) ||
          tensor.bytes > static_cast<std::int64_t>(size) - tensor.begin) {
        __builtin_trap();
      }
    }
  } catch (const twilight::Error&) {
    return 0;
  }
  return 0;
}
