#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "model/config.h"
#include "twilight/error.h"

// A config.json from arbitrary bytes: only twilight::Error may come out, and what is accepted must
// be usable.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const twilight::ModelConfig config = twilight::parse_config(text, "fuzz");
    if (config.group_size() < 1 || config.head_dim % 2 != 0 || config.rms_norm_eps <= 0.0) {
      __builtin_trap();
    }
    for (const float frequency : twilight::rope_inverse_frequencies(config)) {
      if (!std::isfinite(frequency)) __builtin_trap();
    }
    if (twilight::max_context_length(config) < 1) __builtin_trap();
  } catch (const twilight::Error&) {
  }
  return 0;
}
