#ifndef TWILIGHT_OPS_PARAMS_H_
#define TWILIGHT_OPS_PARAMS_H_

#include <cstddef>
#include <cstdint>

#include "kvcache/paged_kv_view.h"
#include "quant/index_format.h"

/// One plain struct per op: raw pointers with their shapes, explicit strides in elements, 64-bit
/// offsets. Fixed-width integers only, so device code can share them. All floats are f32 unless a
/// dtype says otherwise. Nothing here owns memory.
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
  const std::int32_t* ids = nullptr;  ///< [count] ascending sequence numbers
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
};

// --- selection --------------------------------------------------------------------------------

/// Quest scores of sealed pages: max over the group's heads of sum_d max(q_d min_d, q_d max_d),
/// times `scale`. Index format kQuestBf16 or kQuest4.
struct ScorePagesParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  KeyIndexView index;
  float scale = 0;          ///< 1 / sqrt(D)
  float* scores = nullptr;  ///< [B, Hkv, page_stride]; entries of sealed pages are written
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
struct SelectPagesParams {
  SeqSubset seqs;
  PagedKvView kv;
  SelectMode mode = SelectMode::kAll;
  ForcedTokens forced;
  double fraction = 0;
  std::int32_t min_tokens = 0;
  std::int32_t max_tokens = 0;
  const float* scores = nullptr;  ///< [B, Hkv, page_stride], only for kByScore
  std::int64_t page_stride = 0;
  std::int32_t* pages = nullptr;        ///< [B, Hkv, candidate_stride] logical page numbers
  std::int32_t* page_counts = nullptr;  ///< [B, Hkv]
  std::int64_t candidate_stride = 0;    ///< capacity in pages

  [[nodiscard]] std::int64_t budget_pages(std::int64_t n) const {
    const double wanted = fraction * static_cast<double>(n);
    std::int64_t tokens = static_cast<std::int64_t>(wanted);
    if (static_cast<double>(tokens) < wanted) ++tokens;
    if (tokens < min_tokens) tokens = min_tokens;
    if (tokens > max_tokens) tokens = max_tokens;
    return (tokens + kv.page_size - 1) / kv.page_size;
  }
};

// --- pruning ----------------------------------------------------------------------------------

/// Estimated scaled scores of the candidates. Sealed pages use the index (key_bits 4 or 8) or, with
/// `exact_keys`, the keys themselves; the open page always uses its keys.
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
  kNone = 0,     ///< keep every candidate
  kPerHead = 1,  ///< top-p set of each query head, union over the group
};

/// Top-p: for each query head the smallest set of candidates whose softmax mass (over candidates)
/// reaches p, ties at the threshold kept, at least min_tokens of them; forced tokens are added; the
/// kept set of a KV head is the union over its group. `estimates` is overwritten with scratch.
struct PruneParams {
  SeqSubset seqs;
  PagedKvView kv;
  std::int32_t num_q_heads = 0;
  PruneCriterion criterion = PruneCriterion::kPerHead;
  ForcedTokens forced;
  std::int32_t min_tokens = 0;
  const float* p = nullptr;  ///< [B, Hq] in (0, 1]
  const std::int32_t* pages = nullptr;
  const std::int32_t* page_counts = nullptr;
  std::int64_t candidate_stride = 0;
  float* estimates = nullptr;  ///< null for kNone
  std::int64_t estimate_stride = 0;
  std::int32_t* kept = nullptr;         ///< [B, Hkv, kept_stride] ascending token positions
  std::int32_t* kept_counts = nullptr;  ///< [B, Hkv]
  std::int64_t kept_stride = 0;         ///< >= candidate_stride * P
  /// Per query head: its own kept count (forced included) and the softmax mass, over candidates, of
  /// the union that will be attended. kNone gives all candidates and mass 1.
  std::int32_t* head_counts = nullptr;  ///< [B, Hq]
  float* head_mass = nullptr;           ///< [B, Hq]
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

/// The same over the kept tokens alone. An empty list gives zeros.
struct AttendSparseParams {
  SeqSubset seqs;
  QueryView q;
  PagedKvView kv;
  float scale = 0;
  const std::int32_t* kept = nullptr;         ///< [B, Hkv, kept_stride] ascending token positions
  const std::int32_t* kept_counts = nullptr;  ///< [B, Hkv]
  std::int64_t kept_stride = 0;
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
/// dtype.
struct WeightView {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
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
