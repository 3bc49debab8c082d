#ifndef TWILIGHT_MODEL_FINITE_SCAN_H_
#define TWILIGHT_MODEL_FINITE_SCAN_H_

#include <cstddef>
#include <cstdint>

#include "quant/weight_blocks.h"

namespace twilight {

/// Whether any of `bytes` bytes of little-endian elements, or of the f16 scales and minima of
/// quantised blocks, is NaN or infinite. `data` needs no alignment; `bytes` is whole blocks. Reads
/// each byte, or scale, once.
[[nodiscard]] bool has_non_finite(WeightType type, const std::byte* data, std::int64_t bytes);

/// Index of the first element that is NaN or infinite, of quantised blocks the first weight of the
/// block, or -1. Slow; for error messages.
[[nodiscard]] std::int64_t find_non_finite(WeightType type, const std::byte* data,
                                           std::int64_t bytes);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_FINITE_SCAN_H_
