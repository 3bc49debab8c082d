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

/// From attention's output to the next attention's inputs: hidden += out(x), feed_forward, then the
/// next layer's `project` and `append_kv`.
struct AdvanceLayerParams {
  LinearParams out;  ///< adding to feed.norm.x
  FeedForwardParams feed;
  const ProjectParams* next = nullptr;     ///< of feed.norm.x; null after the last layer
  const AppendKvParams* append = nullptr;  ///< of next's k and v; null: they go to no cache
};

/// Number of the largest of each row, the first of equal ones; -1 where a row holds NaN or has no
/// finite maximum.
struct ArgmaxParams {
  const float* x = nullptr;  ///< [num_rows, cols]
  std::int32_t num_rows = 0;
  std::int64_t cols = 0;
  std::int32_t* out = nullptr;  ///< [num_rows]
};

/// How one row's token is drawn; the random number comes with it, so a row's token depends on the
/// row alone.
struct RowDraw {
  double temperature = 0;  ///< 0 or more, finite; 0 takes the first of the largest
  double top_p = 1;        ///< above 0 to 1
  double uniform = 0;      ///< [0, 1)
  std::int32_t top_k = 0;  ///< 0 or more; 0: off
  std::int32_t padding = 0;
};

/// A token of each row of logits x. The definition:
///   order    larger logits first, of equal ones the lower number; the first top_k where top_k > 0
///   weight   exp((x - largest) / temperature), the difference in f32, the rest in f64
///   nucleus  the shortest beginning of the order whose weights reach top_p of the sum of all
///   token    the first of the nucleus at which the weights up to it, itself included, exceed
///            uniform times the nucleus' sum; the last one where rounding leaves none
/// On a host sums are f64 in the order above. Elsewhere weights may be rounded to whole units of at
/// most 2^-61 cols, so that sums depend on no order; the token differs only where top_p or uniform
/// lies within that rounding of a boundary between two tokens. -1 where a row holds NaN or has no
/// finite maximum.
struct SampleRowsParams {
  const float* x = nullptr;  ///< [num_rows, cols]
  std::int32_t num_rows = 0;
  std::int64_t cols = 0;
  const RowDraw* draws = nullptr;  ///< [num_rows]
  std::int32_t* out = nullptr;     ///< [num_rows]
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
