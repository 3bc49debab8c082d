#ifndef TWILIGHT_OPS_VALIDATE_H_
#define TWILIGHT_OPS_VALIDATE_H_

#include "ops/block_params.h"
#include "ops/params.h"

/// Checks of the parameter blocks, the same for every backend: pointers, shapes, strides, lengths
/// and probabilities. Each throws Error(kInvalidArgument) "[op] field, got X, accepted Y" for the
/// first thing wrong. `seqs.ids`, `p` and the lengths (kv.host_len) are read, so they are host
/// memory; contents of caches, tables, scores and lists are not.
namespace twilight {

struct SelectAndPruneParams;
struct SparseStepParams;

inline constexpr std::int32_t kMaxPageSize = 256;
inline constexpr std::int32_t kMaxHeadDim = 512;

void validate(const AppendKvParams& params);
void validate(const SealPagesParams& params);
void validate(const CopyPagesParams& params);
void validate(const ScorePagesParams& params);
void validate(const ExactScoresParams& params);
void validate(const SelectPagesParams& params);
void validate(const EstimateParams& params);
void validate(const PruneParams& params);
/// The blocks the step uses; `scores` and `estimates` may be null.
void validate(const SelectAndPruneParams& params);
void validate(const SparseStepParams& params);
void validate(const AttendDenseParams& params);
void validate(const AttendSparseParams& params);
void validate(const AttendPrefillParams& params);
void validate(const LinearParams& params);
void validate(const RmsNormParams& params);
void validate(const RopeParams& params);
void validate(const SiluMulParams& params);
void validate(const EmbedParams& params);
void validate(const RotationParams& params);
void validate(const ArgmaxParams& params);
void validate(const SampleRowsParams& params);
void validate(const ProjectParams& params);
void validate(const FeedForwardParams& params);
void validate(const AdvanceLayerParams& params);
void validate(const CountTailParams& params);
void validate(const char* op, const Workspace& workspace);

}  // namespace twilight

#endif  // TWILIGHT_OPS_VALIDATE_H_
