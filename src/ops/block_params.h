#ifndef TWILIGHT_OPS_BLOCK_PARAMS_H_
#define TWILIGHT_OPS_BLOCK_PARAMS_H_

#include <cstdint>

#include "ops/params.h"

/// Parameters of what surrounds attention in a forward pass: its inputs and outputs, and groups of
/// small ops that a backend may run as one. Same rules as ops/params.h.
namespace twilight {

/// out[t] = table[tokens[t]] as f32; the table is not quantised.
struct EmbedParams {
  WeightView table;
  const std::int32_t* tokens = nullptr;  ///< [T] rows of the table
  std::int32_t num_tokens = 0;           ///< T
  float* out = nullptr;                  ///< [T, table.cols]
};

/// cos and sin of position * frequency, the product in f64.
struct RotationParams {
  const std::int32_t* positions = nullptr;  ///< [T]
  const double* frequencies = nullptr;      ///< [half]
  std::int32_t num_tokens = 0;              ///< T
  std::int32_t half = 0;                    ///< D / 2
  float* cos = nullptr;                     ///< [T, half]
  float* sin = nullptr;                     ///< [T, half]
};

/// Attention's inputs: q, k and v are products with rms_norm(hidden), q and k then normed head by
/// head where the model does that, and rotated.
struct ProjectParams {
  RmsNormParams norm;    ///< its y is scratch: a backend need not write it
  LinearParams q, k, v;  ///< of norm.y; y with rows packed
  RmsNormParams q_norm;  ///< in place over heads; a null weight for none
  RmsNormParams k_norm;  ///< the same
  RopeParams q_rope, k_rope;
};

/// hidden += down(silu(gate(n)) * up(n)), n = rms_norm(hidden).
struct FeedForwardParams {
  RmsNormParams norm;     ///< its y is scratch
  LinearParams gate, up;  ///< of norm.y; y is scratch with rows packed
  LinearParams down;      ///< of gate.y, adding to norm.x
};

/// Number of the largest of each row, the first of equal ones; -1 where a row holds NaN or has no
/// finite maximum.
struct ArgmaxParams {
  const float* x = nullptr;  ///< [num_rows, cols]
  std::int32_t num_rows = 0;
  std::int64_t cols = 0;
  std::int32_t* out = nullptr;  ///< [num_rows]
};

/// Pages whose value means a sparse step's tail read, candidates and far ones, for statistics.
struct CountTailParams {
  SeqSubset seqs;
  PagedKvView kv;
  std::int32_t num_q_heads = 0;
  TailParams tail;
  std::int32_t* counts = nullptr;  ///< [B, Hkv]
};

}  // namespace twilight

#endif  // TWILIGHT_OPS_BLOCK_PARAMS_H_
