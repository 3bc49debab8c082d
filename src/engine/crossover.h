#ifndef TWILIGHT_ENGINE_CROSSOVER_H_
#define TWILIGHT_ENGINE_CROSSOVER_H_

#include <cstdint>

#include "ops/backend.h"
#include "twilight/policy.h"

namespace twilight {

/// Largest N, a power of two times 256, at which dense attention is still the faster one on this
/// machine; 0 if sparse wins from the start, shape.max_tokens if it never does. Times one layer of
/// one sequence on synthetic keys with planted heavy tokens; takes some tens of milliseconds.
/// Rounding to powers of two keeps the answer the same from run to run unless the machine changes.
[[nodiscard]] std::int32_t measure_crossover(Backend& backend, StepCaps shape, DType cache_dtype,
                                             const SparsePolicy& policy);

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_CROSSOVER_H_
