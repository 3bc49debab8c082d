#ifndef TWILIGHT_ENGINE_SAMPLER_IMPL_H_
#define TWILIGHT_ENGINE_SAMPLER_IMPL_H_

#include "ops/sample_row.h"
#include "twilight/engine.h"

namespace twilight {

/// Throws Error(kInvalidArgument) naming the field.
void check_draw(const TokenDraw& draw);

/// Throws Error(kInvalidArgument) where a draw gave no token.
void check_drawn(std::int32_t token);

[[nodiscard]] RowDraw row_draw_of(const TokenDraw& draw);

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_SAMPLER_IMPL_H_
