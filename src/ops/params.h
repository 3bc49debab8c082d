#ifndef TWILIGHT_OPS_PARAMS_H_
#define TWILIGHT_OPS_PARAMS_H_

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kvcache/paged_kv_view.h"
#include "quant/index_format.h"
#include "quant/weight_blocks.h"

/// One plain struct per op: raw pointers with their shapes, explicit strides in elements, 64-bit
/// offsets. Fixed-width integers only, so device code can share them. All floats are f32 unless a
/// dtype says otherwise. Nothing here owns memory. Pointers are the backend's own memory except
/// where a field says host memory.
namespace twilight {

/// Caller's scratch memory, 64-byte aligned. Contents mean nothing between calls.
struct Workspace {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

/// Upper bounds from which workspace sizes follow.
struct StepCaps {
  std::int32_t max_seqs = 0;     ///< B
  std::int32_t num_q_heads = 0;  ///< Hq
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t page_size = 0;
  std::int32_t max_tokens = 0;           ///< largest N
  std::int32_t max_candidate_pages = 0;  ///< largest candidate list, in pages
};

/// Which rows of a batch an op works on. Null `ids` means all of [0, count). Buffers stay indexed
/// by the sequence number itself, so rows outside the subset are left alone.
struct SeqSubset {
  const std::int32_t* ids = nullptr;  ///< [count] ascending sequence numbers; host memory
  std::int32_t count = 0;

  [[nodiscard]] std::int32_t at(std::int64_t i) const {
    return ids == nullptr ? static_cast<std::int32_t>(i) : ids[i];
  }
};

/// Query heads of one step: element (seq, head, d) at seq * seq_stride + head * D + d.
struct QueryView {
  const float* data = nullptr;  ///< [B, Hq, D]
  std::int64_t seq_stride = 0;
  std::int32_t num_heads = 0;  ///< Hq
};

// --- cache ------------------------------------------------------------------------------------

/// Writes T new keys and values into their slots, rounding to the cache dtype.
struct AppendKvParams {
  PagedKvView kv;
  const float* k = nullptr;  ///< [T, Hkv, D]
  const float* v = nullptr;  ///< [T, Hkv, D]
  std::int64_t k_token_stride = 0;
  std::int64_t v_token_stride = 0;
  const std::int64_t* slots = nullptr;  ///< [T] physical page * P + offset in the page
  std::int32_t num_tokens = 0;          ///< T
};

/// Computes the index records of full pages, all KV heads.
struct SealPagesParams {
  PagedKvView kv;  ///< block_table and seq_lens are not read
  KeyIndexView index;
  const std::int32_t* pages = nullptr;  ///< [num_pages] physical page numbers
  std::int32_t num_pages = 0;
};

/// Copies whole pages inside one layer's pools (copy-on-write): K, V rows and index records.
struct CopyPagesParams {
  PagedKvView kv;
  KeyIndexView index;
  const std::int32_t* from = nullptr;  ///< [num_pages]
  const std::int32_t* to = nullptr;    ///< [num_pages]
  std::int32_t num_pages = 0;
  /// No page is both read and written, so the order does not matter; else pages are copied in
  /// order.
  bool any_order = false;
};

// --- selection --------------------------------------------------------------------------------

/// Scores of sealed pages, higher is better; by index format:
///
/// kQuestBf16, kQuest4: max over the group's heads of sum_d max(q_d min_d, q_d max_d), times scale.
///
/// kLabels: max over the page's tokens and the group's heads of sum_c q_c k_c over the label
/// channels, k as the record holds it, times scale.
///
/// kCentroid, kHalfCentroid, kSubCentroid: log of the page's estimated softmax mass over all sealed
/// pages, mean over the group. With a_i = scale q . mean_i, n_i the tokens it covers, v = scale^2
/// |q|^2 variance / 2 and b = a_0 + scale q . deviant, a head's log mass of a page is
///   kCentroid      log((P - 1) exp(a_0 + v) + exp(b))
///   the others     log(sum_i n_i exp(a_i + v))
/// the page's share exp(l - log sum_pages exp(l)), and the score log(mean_g share_g).
struct ScorePagesParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  KeyIndexView index;
  float scale = 0;          ///< 1 / sqrt(D)
  float* scores = nullptr;  ///< [B, Hkv, page_stride]; entries of sealed pages are written
  /// Each head's log mass of each sealed page, centroid kinds; null where not wanted.
  float* log_masses = nullptr;  ///< [B, Hq, page_stride]
  std::int64_t page_stride = 0;
};

/// Exact scaled scores q.k of every token, for audit and the oracle selector.
struct ExactScoresParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  float scale = 0;
  float* scores = nullptr;  ///< [B, Hq, token_stride]; the first N entries of a row are written
  std::int64_t token_stride = 0;
};

/// Tokens that are always candidates and always kept: the first `sink_tokens`, the open page and
/// the last `recent_pages` sealed pages.
struct ForcedTokens {
  std::int32_t sink_tokens = 0;
  std::int32_t recent_pages = 0;

  /// Whether position `token` of a sequence of N tokens is forced.
  [[nodiscard]] constexpr bool contains(std::int64_t token, std::int64_t n, int page_size) const {
    const std::int64_t recent_begin = (n / page_size - recent_pages) * page_size;
    return token < sink_tokens || token >= recent_begin;
  }
  /// Whether a page holds a forced token.
  [[nodiscard]] constexpr bool contains_page(std::int64_t page_idx, std::int64_t n,
                                             int page_size) const {
    return page_idx * page_size < sink_tokens || page_idx >= n / page_size - recent_pages;
  }
};

enum class SelectMode : std::int32_t {
  kAll,         ///< every page
  kForcedOnly,  ///< pages with forced tokens
  kByScore,     ///< those and the best-scoring sealed pages
};

/// Picks candidate pages. The budget is clamp(ceil(fraction * N), min_tokens, max_tokens) tokens,
/// rounded up to pages, pages with forced tokens included (they are taken even past the budget);
/// the rest are the best scores, ties to the lower page. The list is ascending. NaN scores rank
/// last.
///
/// `mass` in (0, 1) may stop earlier, for scores that are logs of mass (centroid kinds):
/// at the fewest best pages whose mass, with that of the forced sealed pages, reaches `mass` times
/// the sum over all sealed pages, but not below `mass_floor` tokens (pages with forced tokens
/// included, rounded up to pages). 0 takes the whole budget.
struct SelectPagesParams {
  SeqSubset seqs;
  PagedKvView kv;
  SelectMode mode = SelectMode::kAll;
  ForcedTokens forced;
  double fraction = 0;
  std::int32_t min_tokens = 0;
  std::int32_t max_tokens = 0;
  double mass = 0;
  std::int32_t mass_floor = 0;
  const float* scores = nullptr;  ///< [B, Hkv, page_stride], only for kByScore
  std::int64_t page_stride = 0;
  std::int32_t* pages = nullptr;        ///< [B, Hkv, candidate_stride] logical page numbers
  std::int32_t* page_counts = nullptr;  ///< [B, Hkv]
  std::int64_t candidate_stride = 0;    ///< capacity in pages

  [[nodiscard]] constexpr std::int64_t budget_pages(std::int64_t n) const {
    const double wanted = fraction * static_cast<double>(n);
    std::int64_t tokens = static_cast<std::int64_t>(wanted);
    if (static_cast<double>(tokens) < wanted) ++tokens;
    if (tokens < min_tokens) tokens = min_tokens;
    if (tokens > max_tokens) tokens = max_tokens;
    return (tokens + kv.page_size - 1) / kv.page_size;
  }
};

// --- pruning ----------------------------------------------------------------------------------

/// Estimated scaled scores of the candidates. Sealed pages use the index (key_bits 2, 4 or 8) or,
/// with `exact_keys`, the keys themselves; the open page always uses its keys.
struct EstimateParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  KeyIndexView index;
  bool exact_keys = false;
  float scale = 0;
  const std::int32_t* pages = nullptr;        ///< [B, Hkv, candidate_stride]
  const std::int32_t* page_counts = nullptr;  ///< [B, Hkv]
  std::int64_t candidate_stride = 0;
  /// [B, Hkv, G, estimate_stride]; entry i * P + slot is token slot of the i-th candidate page.
  /// Slots past the sequence's end hold -inf.
  float* estimates = nullptr;
  std::int64_t estimate_stride = 0;  ///< >= candidate_stride * P, a multiple of 16
};

enum class PruneCriterion : std::int32_t {
  kNone = 0,       ///< keep every candidate
  kPerHead = 1,    ///< top-p set of each query head, union over the group
  kGroupMean = 2,  ///< top-p set of the mean of the group's weights
};

/// Top-p over w[g, .], the softmax over candidates of each query head. kPerHead: for each head the
/// smallest set whose mass reaches its p; the kept set of a KV head is the union over its group.
/// kGroupMean: the smallest set whose mass under mean_g w[g, .] reaches the largest p of the group.
/// Ties at the threshold are kept, at least min_tokens of them; forced tokens are added.
/// `estimates` is overwritten with scratch.
struct PruneParams {
  SeqSubset seqs;
  PagedKvView kv;
  std::int32_t num_q_heads = 0;
  PruneCriterion criterion = PruneCriterion::kPerHead;
  ForcedTokens forced;
  std::int32_t min_tokens = 0;
  const float* p = nullptr;  ///< [B, Hq] in (0, 1]; host memory
  const std::int32_t* pages = nullptr;
  const std::int32_t* page_counts = nullptr;
  std::int64_t candidate_stride = 0;
  float* estimates = nullptr;  ///< null for kNone
  std::int64_t estimate_stride = 0;
  std::int32_t* kept = nullptr;         ///< [B, Hkv, kept_stride] ascending token positions
  std::int32_t* kept_counts = nullptr;  ///< [B, Hkv]
  std::int64_t kept_stride = 0;         ///< >= candidate_stride * P
  /// Per query head: its own kept count (forced included; the group's for kGroupMean) and the
  /// softmax mass, over candidates, of the set that will be attended. kNone gives all candidates
  /// and mass 1.
  std::int32_t* head_counts = nullptr;  ///< [B, Hq]
  float* head_mass = nullptr;           ///< [B, Hq]
  /// What the tail needs; both null for no tail, and not with kNone. Entry i is the sum over the
  /// dropped tokens of candidate page i of exp(estimate - tail_shift), tail_shift the row's largest
  /// estimate. 0 for the open page (its tokens are all kept).
  float* tail_mass = nullptr;   ///< [B, Hq, candidate_stride]
  float* tail_shift = nullptr;  ///< [B, Hq]; -inf for a row without candidates
};

// --- attention --------------------------------------------------------------------------------

/// Exact softmax attention of one query token per sequence over all N tokens. N = 0 gives zeros.
struct AttendDenseParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  float scale = 0;
  float* out = nullptr;  ///< [B, Hq, D] at seq * out_seq_stride + head * D + d
  std::int64_t out_seq_stride = 0;
};

/// What dropped candidates add to attention: each candidate page's mean value, weighted by the mass
/// prune_top_p left for it. Absent where `mass` is null.
struct TailParams {
  const float* mass = nullptr;                ///< [B, Hq, candidate_stride]
  const float* shift = nullptr;               ///< [B, Hq]
  const std::int32_t* pages = nullptr;        ///< [B, Hkv, candidate_stride]
  const std::int32_t* page_counts = nullptr;  ///< [B, Hkv]
  std::int64_t candidate_stride = 0;
  KeyIndexView index;  ///< value_bits 4
  /// The far tail: sealed pages outside the candidates whose score (log of the group's mean share)
  /// is at least log(far_floor / sealed pages) count too, with m_page = e^(log mass). Absent where
  /// `log_masses` is null; both as score_pages wrote them.
  const float* log_masses = nullptr;  ///< [B, Hq, page_stride]
  const float* scores = nullptr;      ///< [B, Hkv, page_stride]
  std::int64_t page_stride = 0;
  float far_floor = 0;

  /// The lowest score of a far page, for a sequence of `sealed` sealed pages.
  [[nodiscard]] float lowest_far_score(std::int64_t sealed) const {
    return std::log(far_floor / static_cast<float>(sealed));
  }
};

/// The same over the kept tokens alone, and the tail under the same normaliser:
///   out = (sum_kept e^s v + sum_pages m_page mean_page) / (sum_kept e^s + sum_pages m_page),
/// m_page = mass * e^shift for a candidate page. Neither kept tokens nor tail mass gives zeros.
struct AttendSparseParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  float scale = 0;
  const std::int32_t* kept = nullptr;         ///< [B, Hkv, kept_stride] ascending token positions
  const std::int32_t* kept_counts = nullptr;  ///< [B, Hkv]
  std::int64_t kept_stride = 0;
  TailParams tail;
  float* out = nullptr;
  std::int64_t out_seq_stride = 0;
};

/// Causal attention of T new tokens of one sequence; their keys and values are in the cache
/// already, so token i sees positions 0 .. N - T + i.
struct AttendPrefillParams {
  const float* q = nullptr;  ///< [T, Hq, D] at token * q_token_stride + head * D + d
  std::int64_t q_token_stride = 0;
  std::int32_t num_q_heads = 0;
  std::int32_t num_tokens = 0;  ///< T
  PagedKvView kv;               ///< num_seqs = 1
  float scale = 0;
  float* out = nullptr;  ///< [T, Hq, D]
  std::int64_t out_token_stride = 0;
  bool full_precision = false;  ///< f32 products instead of bf16 where the backend would use them
};

// --- model ops --------------------------------------------------------------------------------

/// A weight matrix as the checkpoint holds it: row-major [rows, cols], possibly not aligned to its
/// dtype. A row of a quantised matrix is whole blocks.
struct WeightView {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;  ///< of the elements; not read where `blocks` is quantised
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  WeightType blocks = WeightType::kF32;  ///< a quantised type, or kF32 for elements of `dtype`

  [[nodiscard]] constexpr bool quantised() const { return is_quantised(blocks); }
  [[nodiscard]] constexpr WeightType type() const {
    return quantised() ? blocks : weight_type(dtype);
  }
  [[nodiscard]] constexpr std::int64_t row_bytes() const { return weight_row_bytes(type(), cols); }
};

/// y[M, rows] = x[M, cols] W^T + bias, plus y itself where `accumulate`.
struct LinearParams {
  const float* x = nullptr;
  std::int64_t x_stride = 0;
  std::int32_t num_rows = 0;  ///< M
  WeightView weight;
  const float* bias = nullptr;  ///< [rows] or null
  float* y = nullptr;
  std::int64_t y_stride = 0;
  bool accumulate = false;
  /// A row's result must not depend on the other rows or their number (decode: the same bits in any
  /// batch).
  bool row_invariant = false;
  bool full_precision = false;  ///< f32 products instead of bf16 where the backend would use them
};

/// y = x / sqrt(mean(x^2) + eps) * weight, row by row. y may be x.
struct RmsNormParams {
  const float* x = nullptr;  ///< [M, hidden]
  const float* weight = nullptr;
  float* y = nullptr;
  std::int32_t num_rows = 0;
  std::int64_t hidden = 0;
  float eps = 0;
};

/// Rotary embedding in place, pairs (d, d + D / 2): x' = x cos - x_pair sin, x_pair' = x_pair cos +
/// x sin.
struct RopeParams {
  float* x = nullptr;  ///< [T, heads, D] at token * token_stride + head * D + d
  std::int64_t token_stride = 0;
  std::int32_t num_tokens = 0;
  std::int32_t num_heads = 0;
  std::int32_t head_dim = 0;
  const float* cos = nullptr;  ///< [T, D / 2]
  const float* sin = nullptr;  ///< [T, D / 2]
};

/// y = silu(gate) * up, silu(a) = a / (1 + exp(-a)). y may be gate.
struct SiluMulParams {
  const float* gate = nullptr;  ///< [M, size]
  const float* up = nullptr;
  float* y = nullptr;
  std::int64_t count = 0;  ///< M * size, contiguous
};

}  // namespace twilight

#endif  // TWILIGHT_OPS_PARAMS_H_
