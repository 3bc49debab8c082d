#ifndef TWILIGHT_OPS_SAMPLE_ROW_H_
#define TWILIGHT_OPS_SAMPLE_ROW_H_

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "ops/block_params.h"

namespace twilight {

/// Scratch of `sample_row`: logits with their numbers, in order.
using SampleOrder = std::vector<std::pair<float, std::int32_t>>;

/// SampleRowsParams for one row of one or more logits, on a host. `order` grows to the row's
/// length.
[[nodiscard]] std::int32_t sample_row(std::span<const float> logits, const RowDraw& draw,
                                      SampleOrder& order);

}  // namespace twilight

#endif  // TWILIGHT_OPS_SAMPLE_ROW_H_
