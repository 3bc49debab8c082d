#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_H_

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

/// A tile takes several KV heads: adjacent heads of a page are adjacent in memory, and reading one
/// after the other runs at nearly the speed of a plain read, one head's pages (4 KiB pieces) alone
/// at two thirds of it. Bounds on heads and on heads * (D rounded up to 32).
inline constexpr std::int32_t kAttendMaxHeads = 16;
inline constexpr std::int32_t kAttendMaxChannels = 1024;

[[nodiscard]] constexpr std::int32_t attend_heads_per_tile(std::int32_t dim) {
  const std::int32_t fit = kAttendMaxChannels / ((dim + 31) / 32 * 32);
  return fit < kAttendMaxHeads ? fit : kAttendMaxHeads;
}

/// A run of attended tokens of one sequence, and where its partial states go. Strides
/// are in bytes; token t lives in slot t % page_size of page block_table[t / page_size].
struct AttendTile {
  DType dtype = DType::kBf16;
  std::int32_t group = 0;     ///< G query heads share the KV head
  std::int32_t head_dim = 0;  ///< D, a multiple of 16 up to 512
  std::int32_t page_size = 0;
  std::int32_t num_heads = 1;  ///< KV heads, up to attend_heads_per_tile(D)
  float scale = 0;
  const float* q = nullptr;  ///< [num_heads, G, D]
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  std::int64_t k_page_stride = 0;
  std::int64_t k_head_stride = 0;
  std::int64_t k_token_stride = 0;
  std::int64_t v_page_stride = 0;
  std::int64_t v_head_stride = 0;
  std::int64_t v_token_stride = 0;
  const std::int32_t* block_table = nullptr;
  const std::int32_t* tokens = nullptr;  ///< [num_tokens] ascending; null: first_token + i
  std::int32_t first_token = 0;
  std::int32_t num_tokens = 0;  ///< > 0
  float* partial = nullptr;     ///< attend_partial_floats(G, D) for each head, 64-byte aligned
  std::int64_t partial_head_stride = 0;  ///< in floats
};

/// A partial state holds the unnormalised sum o[G, D], the maximum m[G] of log2(e) * scale * q.k
/// and the sum l[G] of 2^(score - m); tiles merge as in the merge of log-sum-exp pairs.
[[nodiscard]] constexpr std::int64_t attend_partial_floats(std::int64_t group, std::int64_t dim) {
  return (group * (dim + 2) + 15) / 16 * 16;
}

/// The tail of one (sequence, KV head); field meanings as in TailParams, pointers at the unit's own
/// rows, strides of records in bytes.
struct AttendTail {
  std::int32_t group = 0;       ///< G
  std::int32_t head_dim = 0;    ///< D
  const float* mass = nullptr;  ///< [G, mass_stride]
  std::int64_t mass_stride = 0;
  const float* shift = nullptr;         ///< [G]
  const std::int32_t* pages = nullptr;  ///< [page_count] ascending logical page numbers
  std::int64_t page_count = 0;
  const float* log_masses = nullptr;  ///< [G, far_stride] or null
  const float* scores = nullptr;
  std::int64_t far_stride = 0;
  std::int64_t sealed_pages = 0;
  float lowest_far_score = 0;
  const std::int32_t* block_table = nullptr;
  const std::byte* codes = nullptr;  ///< value means
  std::int64_t codes_stride = 0;
  const std::byte* params = nullptr;  ///< PageParams
  std::int64_t params_stride = 0;
  float* partial =
      nullptr;  ///< attend_partial_floats(G, D); m = -inf, l = 0 for a head without mass
};

struct AttendKernels {
  void (*attend_tile)(const AttendTile& tile);
  void (*attend_tail)(const AttendTail& tail);
  /// Merges `count` > 0 partial states, one after another in memory, in that order, and writes the
  /// normalised [G, D] to `out`. Overwrites the first state.
  void (*merge_partials)(float* partials, std::int64_t count, std::int64_t group, std::int64_t dim,
                         float* out);
};

TWILIGHT_DECLARE_KERNELS(AttendKernels, attend_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_H_
