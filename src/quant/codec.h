#ifndef TWILIGHT_QUANT_CODEC_H_
#define TWILIGHT_QUANT_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "quant/index_format.h"

/// Scalar encoders and decoders of the plain (unrotated) index records: the reference every fast
/// version is held to, byte for byte. Thread-safe: they touch only their arguments.
namespace twilight {

/// Writes the tiles of one plain (4 or 8 bits) estimate record. `keys` is [P, D] f32, row-major.
void encode_estimates(IndexLayout layout, int key_bits, int page_size, int head_dim,
                      std::span<const float> keys, std::byte* record);

/// The key of token `slot` as the estimates hold it: scale * code + zero, into `key` [D].
void decode_estimate(IndexLayout layout, int key_bits, int page_size, int head_dim,
                     const std::byte* record, int slot, std::span<float> key);

/// Writes one summary record from `keys` [P, D] f32. kNone writes nothing.
void encode_summary(SummaryKind kind, int page_size, int head_dim, std::span<const float> keys,
                    std::byte* record);

/// The min and max vectors [D] a summary holds. `kind` is kQuestBf16 or kQuest4.
void decode_quest_summary(SummaryKind kind, int head_dim, const std::byte* record,
                          std::span<float> min, std::span<float> max);

/// Largest difference between a key channel and its decoded estimate: half a step of the rounded
/// scale, the f16 rounding of `zero` and what clamping at the top code adds. See docs/numerics.md.
[[nodiscard]] float estimate_error_bound(int key_bits, float lo, float hi);

}  // namespace twilight

#endif  // TWILIGHT_QUANT_CODEC_H_
