#ifndef TWILIGHT_MODEL_FINITE_SCAN_H_
#define TWILIGHT_MODEL_FINITE_SCAN_H_

#include <cstddef>
#include <cstdint>

#include "twilight/types.h"

namespace twilight {

/// Whether any of `bytes` bytes of little-endian elements is NaN or infinite. `data` needs no
/// alignment; `bytes` is a multiple of the element size. Reads each byte once.
[[nodiscard]] bool has_non_finite(DType dtype, const std::byte* data, std::int64_t bytes);

/// Index of the first element that is NaN or infinite, or -1. Slow; for error messages.
[[nodiscard]] std::int64_t find_non_finite(DType dtype, const std::byte* data, std::int64_t bytes);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_FINITE_SCAN_H_
