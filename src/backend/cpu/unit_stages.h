#ifndef TWILIGHT_BACKEND_CPU_UNIT_STAGES_H_
#define TWILIGHT_BACKEND_CPU_UNIT_STAGES_H_

#include <cstdint>

#include "backend/cpu/kernels/select.h"
#include "ops/params.h"

/// Selection and pruning of one unit, a (sequence, KV head), without threads: the parts of the
/// single ops and of the fused ones. Results do not depend on which of them call.
namespace twilight::cpu {

/// Writes the candidate list. `scores` is the unit's row, read only for kByScore. `scratch`:
/// select_scratch_entries(sealed pages).
void select_unit(const SelectKernels& kernels, const SelectPagesParams& params, std::int32_t seq,
                 std::int64_t kv_head, const float* scores, std::int32_t* scratch);

/// Rows of one unit as pruning takes them.
struct PruneRows {
  float* estimates = nullptr;  ///< [G, stride], overwritten; null for kNone
  std::int64_t stride = 0;     ///< a multiple of 16
  /// [G] largest estimate of each row that is not NaN, -inf where there is none; null: found here.
  /// Not read without candidates.
  const float* maxima = nullptr;
  HeadSet* sets = nullptr;  ///< [G], filled by prune_head
};

/// Pruning in two parts. First every query head g of the unit, in any order and on any thread; then
/// the whole unit. `scratch`: prune_scratch_entries(candidate tokens), and means nothing between.
void prune_head(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                std::int64_t kv_head, std::int64_t g, const PruneRows& rows, std::int32_t* scratch);
void prune_union(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                 std::int64_t kv_head, const PruneRows& rows, std::int32_t* scratch);

/// Both parts, one thread.
void prune_unit(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                std::int64_t kv_head, const PruneRows& rows, std::int32_t* scratch);

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_UNIT_STAGES_H_
