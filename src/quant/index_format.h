#ifndef TWILIGHT_QUANT_INDEX_FORMAT_H_
#define TWILIGHT_QUANT_INDEX_FORMAT_H_

#include <cstddef>
#include <cstdint>

#include "twilight/types.h"

/// Byte layout of the key index: what selection and pruning read instead of K and V. Every record
/// belongs to one (page, KV head) and is a pure function of that page's keys and values.
/// docs/formats.md shows the same layouts with examples.
namespace twilight {

// ---------------------------------------------------------------------------------------------
// Code planes come in two orders of the same codes. Everything else is equal in both.
enum class IndexLayout : std::int32_t {
  /// A 64-byte load holds one 32-bit lane for each of 16 tokens: dot products on SIMD lanes need no
  /// sums across lanes.
  kTokenLanes = 0,
  /// Fragments of 16 x 32 int8 matrix instructions; D a multiple of 32. See quant/code_place.h.
  kMma = 1,
};

// ---------------------------------------------------------------------------------------------
// Summaries: one per page and KV head, for a selector.
enum class SummaryKind : std::int32_t {
  kNone = 0,
  /// Per-channel min then max over the page's tokens, bf16: [min 0..D) [max 0..D). Rounded outwards
  /// where the cache holds more precision than bf16, so the bounds stay bounds.
  kQuestBf16 = 1,
  /// The same vectors before that rounding, at 4 bits, nearest. Byte j of D / 2: low nibble channel
  /// j, high nibble channel j + D / 2; min codes, max codes, then f16 min scale, min zero, max
  /// scale, max zero and 8 bytes of zero. Each vector is quantised over its D channels by the rule
  /// of the plain estimates with 15 levels.
  kQuest4 = 2,
  /// Rotated mean of the page's keys, then the rotated residual of its most deviant key (the one
  /// farthest from the decoded mean, ties to the lower slot), both at 4 bits: D bytes.
  kCentroid = 3,
  /// Rotated means of kSubCentroids runs of ceil(P / kSubCentroids) tokens, 4 bits each: 2 D bytes.
  kSubCentroid = 4,
  /// Rotated means of the page's two runs of ceil(P / 2) tokens, 4 bits each: D bytes.
  kHalfCentroid = 5,
  /// The page's keys on `label_channels` channels a KV head, those of KeyIndexView::labels in that
  /// order: an estimate record of 4 bits with that many channels for D, always in kTokenLanes
  /// order.
  kLabels = 6,
};

inline constexpr int kSubCentroids = 4;  ///< the most means a summary holds

/// Means a summary holds: 0, 1, 2 or kSubCentroids.
[[nodiscard]] constexpr int num_centroids(SummaryKind kind) {
  switch (kind) {
    case SummaryKind::kCentroid:
      return 1;
    case SummaryKind::kHalfCentroid:
      return 2;
    case SummaryKind::kSubCentroid:
      return kSubCentroids;
    default:
      return 0;
  }
}
/// Tokens a mean covers.
[[nodiscard]] constexpr int centroid_tokens(SummaryKind kind, int page_size) {
  const int means = num_centroids(kind);
  return means > 1 ? (page_size + means - 1) / means : page_size;
}

/// Bytes of one (page, KV head) summary; at D = 128: 512 (kQuestBf16), 144 (kQuest4), 128
/// (kCentroid, kHalfCentroid), 256 (kSubCentroid). Not for kLabels, whose size depends on more.
[[nodiscard]] constexpr std::int64_t summary_record_bytes(SummaryKind kind, int head_dim) {
  switch (kind) {
    case SummaryKind::kNone:
      return 0;
    case SummaryKind::kQuestBf16:
      return std::int64_t{4} * head_dim;
    case SummaryKind::kQuest4:
      return head_dim + 16;
    case SummaryKind::kCentroid:
    case SummaryKind::kHalfCentroid:
      return head_dim;
    case SummaryKind::kSubCentroid:
      return std::int64_t{kSubCentroids} * head_dim / 2;
    case SummaryKind::kLabels:
      break;
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------
// Rotated planes (centroids, 2-bit estimates) hold y = R k, R the orthogonal transform of
// quant/rotation.h; R q . R k = q . k. Vectors at b bits are mid-rise around zero:
//
//   x_d ~= scale * (code_d - (2^b - 1) / 2)
//
// 4 bits (centroids, deviant residuals, value means): scale = f16(max |x| / 7.5),
//   code = clamp(round_half_even(x / scale + 7.5), 0, 15), 7 where scale is 0. Codes lie in D / 2
//   bytes; byte j: low nibble channel 8 (j / 4) + j % 4, high nibble that + 4.
// 2 bits (residual r of a token from the decoded mean that covers it): with rms = sqrt(sum r^2 /
// D),
//   code = 2 + (r > rms) where r >= 0, 1 - (r < -rms) elsewhere;
//   scale = f16(sum |r| u / sum u^2), u = |code - 1.5|: least squares.
//
// All in f32 without contraction; sums over D run in 16 lanes, lane i adding channels i, i + 16,
// ... in order, and then fold 8, 4, 2, 1 (quant/lane_sum.h), so every implementation gets the same
// bits. Sums over tokens run in slot order.

/// Scales of a page's rotated vectors and value mean, one record per (page, KV head) of f16 values.
/// The plane exists where the format has centroids, 2-bit estimates or value means.
struct PageParams {
  /// Scale of each mean, or of the mean and the deviant residual (kCentroid).
  std::uint16_t centre_scale[kSubCentroids];
  /// Mean over tokens and channels of the squared residual.
  std::uint16_t variance;
  std::uint16_t value_scale;
  std::uint16_t unused[2];
};
static_assert(sizeof(PageParams) == 16);

/// Bytes of a 4-bit vector of D channels.
[[nodiscard]] constexpr std::int64_t nibble_bytes(int head_dim) { return head_dim / 2; }

// ---------------------------------------------------------------------------------------------
// Estimates: low-bit keys, one per token and KV head.
//
// 4 and 8 bits, asymmetric over D, of the plain keys; levels = 2^bits - 1
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
// 2 bits: rotated residuals as above, a scale and no zero.
//
// A record is a sequence of tiles of 16 tokens (the last tile of a page is padded with zero codes,
// scale 0, zero 0). A tile is codes, then 16 scales (f16), then for 4 and 8 bits 16 zeros (f16). In
// kTokenLanes order:
//
//   2 bits: D / 16 groups of 64 bytes; group g, byte 4 t + b, bits 2 s: channel 16 g + 4 s + b of
//           token t.
//   4 bits: D / 8 groups of 64 bytes; group g, byte 4 t + b: low nibble channel 8 g + b of token t,
//           high nibble channel 8 g + 4 + b.
//   8 bits: D / 4 groups of 64 bytes; group g, byte 4 t + b: channel 4 g + b of token t.
//
// Where the summary holds no centroid, a 2-bit record ends with the page's own: D / 2 bytes.
inline constexpr int kEstimateTileTokens = 16;

/// Label channels of a KV head are a multiple of the unit, up to the most.
inline constexpr int kLabelUnit = 16;
inline constexpr int kMaxLabels = 128;

[[nodiscard]] constexpr std::int64_t estimate_code_bytes(int key_bits, int head_dim) {
  return std::int64_t{kEstimateTileTokens} * head_dim * key_bits / 8;
}
[[nodiscard]] constexpr std::int64_t estimate_tile_bytes(int key_bits, int head_dim) {
  return estimate_code_bytes(key_bits, head_dim) + (key_bits == 2 ? 2 : 4) * kEstimateTileTokens;
}
[[nodiscard]] constexpr int estimate_tiles_per_page(int page_size) {
  return (page_size + kEstimateTileTokens - 1) / kEstimateTileTokens;
}

// ---------------------------------------------------------------------------------------------

/// Which planes an index holds. `key_bits` 0 means no estimates, `value_bits` 0 no value means.
struct IndexFormat {
  SummaryKind summary = SummaryKind::kQuestBf16;
  std::int32_t key_bits = 4;    ///< 0, 2, 4, 8
  std::int32_t value_bits = 0;  ///< 0 or 4
  IndexLayout layout = IndexLayout::kTokenLanes;
  std::int32_t label_channels = 0;  ///< kLabels: a multiple of kLabelUnit up to kMaxLabels

  /// Whether 2-bit records carry the mean they are centred on themselves.
  [[nodiscard]] constexpr bool own_centre() const {
    return key_bits == 2 && num_centroids(summary) == 0;
  }
  /// Whether the plane of PageParams exists.
  [[nodiscard]] constexpr bool has_params() const {
    return num_centroids(summary) > 0 || key_bits == 2 || value_bits != 0;
  }

  friend bool operator==(const IndexFormat&, const IndexFormat&) = default;
};

/// Bytes of one (page, KV head) summary of any kind; kLabels at P = 16: 192 with 16 channels, 320
/// with 32.
[[nodiscard]] constexpr std::int64_t summary_record_bytes(const IndexFormat& format, int page_size,
                                                          int head_dim) {
  return format.summary == SummaryKind::kLabels
             ? estimate_tiles_per_page(page_size) * estimate_tile_bytes(4, format.label_channels)
             : summary_record_bytes(format.summary, head_dim);
}

/// Head dimensions a format takes are multiples of this.
[[nodiscard]] constexpr int head_dim_unit(const IndexFormat& format) {
  if (format.layout == IndexLayout::kMma) return 32;
  if (format.key_bits == 2) return 16;
  if (format.key_bits == 4 || num_centroids(format.summary) > 0 || format.value_bits != 0) return 8;
  if (format.key_bits == 8) return 4;
  return format.summary == SummaryKind::kNone ? 1 : 2;
}

/// Bytes of one (page, KV head) estimate record; P = 16, D = 128: 544 for 2 bits (608 with its own
/// centre), 1,088 for 4, 2,112 for 8.
[[nodiscard]] constexpr std::int64_t estimate_record_bytes(const IndexFormat& format, int page_size,
                                                           int head_dim) {
  if (format.key_bits == 0) return 0;
  return estimate_tiles_per_page(page_size) * estimate_tile_bytes(format.key_bits, head_dim) +
         (format.own_centre() ? nibble_bytes(head_dim) : 0);
}

/// The planes of one layer, each a pool indexed by physical page number. Owns nothing. Records
/// start at base + page * page_stride + head * head_stride (bytes) and are 16-byte aligned or
/// better. A pointer is null where the format has no such plane.
struct KeyIndexView {
  IndexFormat format;
  std::byte* summaries = nullptr;
  std::int64_t summary_page_stride = 0;
  std::int64_t summary_head_stride = 0;
  std::byte* estimates = nullptr;
  std::int64_t estimate_page_stride = 0;
  std::int64_t estimate_head_stride = 0;
  std::byte* value_means = nullptr;  ///< nibble_bytes(D) a record
  std::int64_t value_page_stride = 0;
  std::int64_t value_head_stride = 0;
  std::byte* params = nullptr;  ///< PageParams
  std::int64_t params_page_stride = 0;
  std::int64_t params_head_stride = 0;
  /// kLabels: [Hkv, label_channels] channels below D; host memory. A property of the model, not of
  /// the page.
  const std::int32_t* labels = nullptr;

  [[nodiscard]] constexpr const std::int32_t* head_labels(std::int64_t head) const {
    return labels + head * format.label_channels;
  }
  [[nodiscard]] constexpr std::byte* summary(std::int64_t page, std::int64_t head) const {
    return summaries + page * summary_page_stride + head * summary_head_stride;
  }
  [[nodiscard]] constexpr std::byte* estimate(std::int64_t page, std::int64_t head) const {
    return estimates + page * estimate_page_stride + head * estimate_head_stride;
  }
  [[nodiscard]] constexpr std::byte* value_mean(std::int64_t page, std::int64_t head) const {
    return value_means + page * value_page_stride + head * value_head_stride;
  }
  [[nodiscard]] PageParams* page_params(std::int64_t page, std::int64_t head) const {
    return reinterpret_cast<PageParams*>(params + page * params_page_stride +
                                         head * params_head_stride);
  }
  /// Codes of the means that centre the 2-bit estimates of a page.
  [[nodiscard]] constexpr std::byte* centres(std::int64_t page, std::int64_t head, int page_size,
                                             int head_dim) const {
    if (!format.own_centre()) return summary(page, head);
    return estimate(page, head) + estimate_record_bytes(format, page_size, head_dim) -
           nibble_bytes(head_dim);
  }
};

}  // namespace twilight

#endif  // TWILIGHT_QUANT_INDEX_FORMAT_H_
