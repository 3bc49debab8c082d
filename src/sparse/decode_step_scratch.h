#ifndef TWILIGHT_SPARSE_DECODE_STEP_SCRATCH_H_
#define TWILIGHT_SPARSE_DECODE_STEP_SCRATCH_H_

#include "sparse/decode_step.h"

/// For the files of DecodeStep alone.
namespace twilight {

/// Slices of the workspace, what statistics read first. All but `ops` hold what one op hands to the
/// next.
struct DecodeStep::Scratch {
  std::int32_t* page_counts;  ///< [B, Hkv]
  std::int32_t* kept_counts;  ///< [B, Hkv]
  std::int32_t* head_counts;  ///< [B, Hq]
  float* head_mass;           ///< [B, Hq]
  std::int32_t* tail_counts;  ///< [B, Hkv]; null without a tail
  float* tail_shift;          ///< [B, Hq]
  float* tail_mass;           ///< [B, Hq, candidate pages]; null without a tail
  std::int32_t* pages;        ///< [B, Hkv, candidate pages]
  float* scores;              ///< [B, Hkv, pages]
  std::int32_t* kept;         ///< [B, Hkv, slots]
  float* log_masses;          ///< [B, Hq, pages]; null without a far tail
  float* estimates;           ///< [B, Hkv, G, slots]; null where the fused op keeps its own
  float* selector;
  Workspace ops;
  std::int64_t page_stride;
  std::int64_t slot_stride;
  std::size_t counts_bytes;  ///< up to here what statistics read,
  std::size_t kept_bytes;    ///< up to here what an audit reads too
  std::size_t used_bytes;
};

}  // namespace twilight

#endif  // TWILIGHT_SPARSE_DECODE_STEP_SCRATCH_H_
