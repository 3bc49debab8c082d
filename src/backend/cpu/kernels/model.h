#ifndef TWILIGHT_BACKEND_CPU_KERNELS_MODEL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_MODEL_H_

#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

/// Up to this many rows `matvec` is used anyway; more go through oneDNN unless they must be
/// row-invariant.
inline constexpr std::int32_t kMatvecMaxRows = 8;

/// Range kernels of the model's small ops: no threading, and no value depends on how the range was
/// cut.
struct ModelKernels {
  /// Output rows [begin, end) of a linear layer with num_rows <= kMatvecMaxRows, in f32. Reads each
  /// weight once.
  void (*matvec)(const LinearParams& params, std::int64_t begin, std::int64_t end);
  /// Rows [begin, end).
  void (*rms_norm)(const RmsNormParams& params, std::int64_t begin, std::int64_t end);
  /// Tokens [begin, end).
  void (*rope)(const RopeParams& params, std::int64_t begin, std::int64_t end);
  /// Elements [begin, end).
  void (*silu_mul)(const SiluMulParams& params, std::int64_t begin, std::int64_t end);
};

TWILIGHT_DECLARE_KERNELS(ModelKernels, model_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_MODEL_H_
