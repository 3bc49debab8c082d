#ifndef TWILIGHT_QUANT_INDEX_FORMAT_H_
#define TWILIGHT_QUANT_INDEX_FORMAT_H_

#include <cstddef>
#include <cstdint>

#include "twilight/types.h"

/// Byte layout of the key index: what selection and pruning read instead of K and V. Every record
/// belongs to one (page, KV head) and is a pure function of that page's keys. docs/formats.md shows
/// the same layouts with examples.
namespace twilight {

// ---------------------------------------------------------------------------------------------
// Estimates: low-bit keys, one per token and KV head, asymmetric over D.
//
//   levels = 2^bits - 1
//
//   lo, hi = min, max over D of the token's key, -0 counted as +0
//
//   zero   = f16(lo); scale = f16((hi - lo) / levels), both clamped to the finite range
//
//   code_d = clamp(round_half_even((k_d - zero) / scale), 0, levels), 0 where scale is 0
//
//   k_d   ~= scale * code_d + zero
//
// all in f32. Keys are finite: one that is not gives some record, never a fault.
//
// A record is a sequence of tiles of 16 tokens (the last tile of a page is padded with zero codes,
// scale 0, zero 0). A tile is codes, then 16 scales (f16), then 16 zeros (f16):
//
//   4 bits: D / 8 groups of 64 bytes; group g, byte 4 t + b: low nibble channel 8 g + b of token t,
//           high nibble channel 8 g + 4 + b.
//   8 bits: D / 4 groups of 64 bytes; group g, byte 4 t + b: channel 4 g + b of token t.
//
// So a 64-byte load holds one 32-bit lane per token and dot products need no horizontal sums.
inline constexpr int kEstimateTileTokens = 16;

[[nodiscard]] constexpr std::int64_t estimate_code_bytes(int key_bits, int head_dim) {
  return std::int64_t{kEstimateTileTokens} * head_dim * key_bits / 8;
}
[[nodiscard]] constexpr std::int64_t estimate_tile_bytes(int key_bits, int head_dim) {
  return estimate_code_bytes(key_bits, head_dim) + 2 * 2 * kEstimateTileTokens;
}
[[nodiscard]] constexpr int estimate_tiles_per_page(int page_size) {
  return (page_size + kEstimateTileTokens - 1) / kEstimateTileTokens;
}
/// Bytes of one (page, KV head) record; 1,088 for 4 bits, P = 16, D = 128.
[[nodiscard]] constexpr std::int64_t estimate_record_bytes(int key_bits, int page_size,
                                                           int head_dim) {
  return estimate_tiles_per_page(page_size) * estimate_tile_bytes(key_bits, head_dim);
}

// ---------------------------------------------------------------------------------------------
// Summaries: one per page and KV head, for a selector.
enum class SummaryKind : std::int32_t {
  kNone = 0,
  /// Per-channel min then max over the page's tokens, bf16: [min 0..D) [max 0..D). Rounded outwards
  /// where the cache holds more precision than bf16, so the bounds stay bounds.
  kQuestBf16 = 1,
  /// The same vectors before that rounding, at 4 bits, nearest. Byte j of D / 2: low nibble channel
  /// j, high nibble channel j + D / 2; min codes, max codes, then f16 min scale, min zero, max
  /// scale, max zero and 8 bytes of zero. Each vector is quantised over its D channels by the
  /// estimate rule above with 15 levels.
  kQuest4 = 2,
};

/// Bytes of one (page, KV head) summary; 512 for kQuestBf16 and 144 for kQuest4 at D = 128.
[[nodiscard]] constexpr std::int64_t summary_record_bytes(SummaryKind kind, int head_dim) {
  switch (kind) {
    case SummaryKind::kNone:
      return 0;
    case SummaryKind::kQuestBf16:
      return std::int64_t{4} * head_dim;
    case SummaryKind::kQuest4:
      return head_dim + 16;
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------

/// Which planes an index holds. `key_bits` 0 means no estimates.
struct IndexFormat {
  SummaryKind summary = SummaryKind::kQuestBf16;
  std::int32_t key_bits = 4;

  friend bool operator==(const IndexFormat&, const IndexFormat&) = default;
};

/// The planes of one layer, each a pool indexed by physical page number. Owns nothing. Records
/// start at base + page * page_stride + head * head_stride (bytes) and are 16-byte aligned or
/// better.
struct KeyIndexView {
  IndexFormat format;
  std::byte* summaries = nullptr;  ///< null where format.summary is kNone
  std::int64_t summary_page_stride = 0;
  std::int64_t summary_head_stride = 0;
  std::byte* estimates = nullptr;  ///< null where format.key_bits is 0
  std::int64_t estimate_page_stride = 0;
  std::int64_t estimate_head_stride = 0;

  [[nodiscard]] std::byte* summary(std::int64_t page, std::int64_t head) const {
    return summaries + page * summary_page_stride + head * summary_head_stride;
  }
  [[nodiscard]] std::byte* estimate(std::int64_t page, std::int64_t head) const {
    return estimates + page * estimate_page_stride + head * estimate_head_stride;
  }
};

}  // namespace twilight

#endif  // TWILIGHT_QUANT_INDEX_FORMAT_H_
