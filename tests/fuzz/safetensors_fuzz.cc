#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "model/safetensors.h"
#include "twilight/error.h"

// Headers and indices from arbitrary bytes: only twilight::Error may come out, and every range that
// is accepted must lie inside the input.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    for (const auto& entry : twilight::parse_safetensors(bytes, "fuzz")) {
      if (entry.begin < 8 || entry.begin > entry.end ||
          entry.end > static_cast<std::int64_t>(size)) {
        __builtin_trap();
      }
    }
  } catch (const twilight::Error&) {
  }
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    for (const auto& [tensor, shard] : twilight::parse_safetensors_index(text, "fuzz")) {
      if (shard.empty() || shard.find('/') != std::string::npos) __builtin_trap();
    }
  } catch (const twilight::Error&) {
  }
  return 0;
}
