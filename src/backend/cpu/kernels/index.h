#ifndef TWILIGHT_BACKEND_CPU_KERNELS_INDEX_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_INDEX_H_

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "core/buffer.h"
#include "ops/params.h"

namespace twilight::cpu {

/// One (sequence, KV head) of a step: the unit the index kernels work on.
struct IndexUnit {
  PagedKvView kv;
  KeyIndexView index;
  const float* q = nullptr;  ///< [G, D] the unit's query heads, contiguous
  std::int32_t group = 0;    ///< G
  std::int32_t seq = 0;
  std::int32_t kv_head = 0;
  float scale = 0;
};

/// The unit of a ScorePagesParams, EstimateParams or (index left empty) ExactScoresParams.
template <typename Params>
[[nodiscard]] inline IndexUnit index_unit(const Params& params, std::int32_t seq,
                                          std::int32_t kv_head) {
  IndexUnit unit;
  unit.kv = params.kv;
  if constexpr (requires { params.index; }) unit.index = params.index;
  unit.group = params.q.num_heads / params.kv.num_kv_heads;
  unit.seq = seq;
  unit.kv_head = kv_head;
  unit.q = params.q.data + seq * params.q.seq_stride +
           std::int64_t{kv_head} * unit.group * params.kv.head_dim;
  unit.scale = params.scale;
  return unit;
}

/// Bytes of a prepared query, whichever kernel it is for. The form is the kernels' own; the memory
/// is the caller's, 64-byte aligned.
[[nodiscard]] constexpr std::size_t prepared_query_bytes(int head_dim, int group) {
  const std::size_t heads = (static_cast<std::size_t>(group) + 3) / 4 * 4;
  const std::size_t channels = (static_cast<std::size_t>(head_dim) + 127) / 128 * 128;
  return align_up(heads * (12 * channels + 128));
}

/// Scaled dots of the unit's queries with the means that centre 2-bit estimates, as `log_masses`
/// leaves them: data[(head * stride + page) * n + i], n = num_centroids, page a logical number.
struct CentreDots {
  const float* data = nullptr;
  std::int64_t stride = 0;  ///< pages
};

/// Kernels of the index and the cache. All are range functions without threading; a value depends
/// on its own inputs alone, never on where a range begins or ends, so any split gives the same
/// bits. Thread-safe for disjoint outputs.
struct IndexKernels {
  /// Writes the form of the unit's queries that `score_pages` reads. unit.index.format.summary is
  /// kQuestBf16 or kQuest4.
  void (*prepare_scores)(const IndexUnit& unit, std::byte* query);
  /// Scores of the sealed pages [page_begin, page_end) into scores[page].
  void (*score_pages)(const IndexUnit& unit, const std::byte* query, std::int64_t page_begin,
                      std::int64_t page_end, float* scores);

  /// The same in two steps for kCentroid and kSubCentroid. `log_masses` gives each head's log mass
  /// of the sealed pages [page_begin, page_end), masses[head * stride + page], and where `dots` is
  /// not null the dots of their means, in the form of CentreDots.
  void (*prepare_masses)(const IndexUnit& unit, std::byte* query);
  void (*log_masses)(const IndexUnit& unit, const std::byte* query, std::int64_t page_begin,
                     std::int64_t page_end, float* masses, std::int64_t stride, float* dots,
                     std::int64_t dot_stride);
  /// Scores of all `pages` sealed pages of a unit from its heads' log masses [group, stride].
  /// norms [group] gets the log of each head's sum.
  void (*combine_masses)(const float* masses, std::int64_t stride, int group, std::int64_t pages,
                         float* norms, float* scores);

  /// Writes the form of the unit's queries that `estimate` reads. key_bits 2, 4 or 8.
  void (*prepare_estimates)(const IndexUnit& unit, std::byte* query);
  /// Estimated scaled scores of candidates [begin, end) of the list `pages` (logical numbers):
  /// estimates[head * stride + i * P + slot] for each of the G heads, -inf past the sequence's end.
  /// Sealed pages are read from the index, the open one (and all where `exact_keys`, which needs no
  /// `query` unless an index is read) from the cache. 2 bits take the means' dots from `dots` or,
  /// where it has no data, compute them again with the same bits. row_max [G] gets each row's
  /// largest estimate over these candidates, NaN passed over, -inf where there is none.
  void (*estimate)(const IndexUnit& unit, const std::byte* query, bool exact_keys,
                   const std::int32_t* pages, std::int64_t begin, std::int64_t end,
                   const CentreDots& dots, float* estimates, std::int64_t stride, float* row_max);

  /// Exact scaled scores of tokens [token_begin, token_end): scores[head * stride + token].
  void (*exact_scores)(const IndexUnit& unit, std::int64_t token_begin, std::int64_t token_end,
                       float* scores, std::int64_t stride);

  /// Rounds `count` floats to `dtype`, to nearest even; NaN stays NaN.
  void (*convert_row)(DType dtype, const float* from, std::int64_t count, std::byte* to);
  /// Writes the index records of one (physical page, KV head), the bytes of quant/page_codec.h.
  /// `scratch` has seal_scratch_bytes, 64-byte aligned.
  void (*seal_page)(const PagedKvView& kv, const KeyIndexView& index, std::int64_t page,
                    std::int64_t kv_head, std::byte* scratch);
};

/// Scratch of `seal_page`: 16 rows, two vectors (bounds, or a mean and a residual) and the codes of
/// one row, for D.
[[nodiscard]] constexpr std::size_t seal_scratch_bytes(int head_dim) {
  return align_up(static_cast<std::size_t>(head_dim) * (kEstimateTileTokens * 4 + 2 * 4 + 4));
}

TWILIGHT_DECLARE_KERNELS(IndexKernels, index_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_INDEX_H_
