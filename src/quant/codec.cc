#include "quant/codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"
#include "quant/code_place.h"
#include "quant/f16_fields.h"

namespace twilight {
namespace {

/// The rule of index_format.h for one vector: scale and zero as stored, codes by `code`.
struct Quantiser {
  std::uint16_t scale_bits = 0;
  std::uint16_t zero_bits = 0;
  float scale = 0;
  float zero = 0;
  float levels = 0;

  Quantiser(int bits, float lo, float hi) : levels(static_cast<float>((1 << bits) - 1)) {
    scale_bits = f16_clamped((hi - lo) / levels);
    zero_bits = f16_clamped(lo);
    scale = f16_to_f32(scale_bits);
    zero = f16_to_f32(zero_bits);
  }

  [[nodiscard]] std::uint8_t code(float x) const {
    if (scale == 0.0F) return 0;
    const float steps = std::nearbyint((x - zero) / scale);
    return static_cast<std::uint8_t>(!(steps > 0.0F) ? 0.0F : std::min(steps, levels));
  }
};

/// Min and max, zeros always +0 so that the result does not depend on the order of comparison.
struct Range {
  float lo = std::numeric_limits<float>::infinity();
  float hi = -std::numeric_limits<float>::infinity();

  void add(float x) {
    lo = std::min(lo, x);
    hi = std::max(hi, x);
  }
  [[nodiscard]] Range canonical() const { return {.lo = lo + 0.0F, .hi = hi + 0.0F}; }
};

Range range_of(std::span<const float> row) {
  Range range;
  for (const float x : row) range.add(x);
  return range.canonical();
}

void check_key_bits(const char* where, int key_bits, int head_dim) {
  require(key_bits == 4 || key_bits == 8, where, "key_bits, got ", key_bits, ", accepted 4 or 8");
  const int unit = key_bits == 4 ? 8 : 4;
  require(head_dim > 0 && head_dim % unit == 0, where, "head_dim, got ", head_dim,
          ", accepted multiples of ", unit);
}

/// bf16 bits of the nearest value that is not above `x`.
std::uint16_t bf16_floor(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const bool away = (bits >> 31) != 0 && (bits & 0xffffU) != 0;
  return static_cast<std::uint16_t>((bits >> 16) + (away ? 1U : 0U));
}

std::uint16_t bf16_ceil(float x) { return static_cast<std::uint16_t>(bf16_floor(-x) ^ 0x8000U); }

/// Codes of channel j and j + D / 2 share byte j; scale and zero go to `params`.
void encode_quest4_vector(std::span<const float> vector, std::byte* codes, std::byte* params) {
  const Range range = range_of(vector);
  const Quantiser quantiser(4, range.lo, range.hi);
  const std::size_t half = vector.size() / 2;
  for (std::size_t j = 0; j < half; ++j) {
    codes[j] =
        static_cast<std::byte>(quantiser.code(vector[j]) | (quantiser.code(vector[j + half]) << 4));
  }
  store_f16(params, quantiser.scale_bits);
  store_f16(params + 2, quantiser.zero_bits);
}

void decode_quest4_vector(const std::byte* codes, const std::byte* params,
                          std::span<float> vector) {
  const float scale = load_f16(params);
  const float zero = load_f16(params + 2);
  const std::size_t half = vector.size() / 2;
  for (std::size_t j = 0; j < half; ++j) {
    const auto byte = std::to_integer<unsigned>(codes[j]);
    vector[j] = scale * static_cast<float>(byte & 15U) + zero;
    vector[j + half] = scale * static_cast<float>(byte >> 4) + zero;
  }
}

}  // namespace

void encode_estimates(IndexLayout layout, int key_bits, int page_size, int head_dim,
                      std::span<const float> keys, std::byte* record) {
  check_key_bits("encode_estimates", key_bits, head_dim);
  std::memset(record, 0,
              static_cast<std::size_t>(estimate_tiles_per_page(page_size) *
                                       estimate_tile_bytes(key_bits, head_dim)));
  const std::int64_t code_bytes = estimate_code_bytes(key_bits, head_dim);
  for (int slot = 0; slot < page_size; ++slot) {
    const auto dim = static_cast<std::size_t>(head_dim);
    const std::span<const float> key = keys.subspan(static_cast<std::size_t>(slot) * dim, dim);
    const Range range = range_of(key);
    const Quantiser quantiser(key_bits, range.lo, range.hi);
    std::byte* tile = record + slot / kEstimateTileTokens * estimate_tile_bytes(key_bits, head_dim);
    const int t = slot % kEstimateTileTokens;
    for (int d = 0; d < head_dim; ++d) {
      const CodePlace place = code_place(layout, key_bits, head_dim, t, d);
      const unsigned code = quantiser.code(key[static_cast<std::size_t>(d)]);
      tile[place.byte] |= static_cast<std::byte>(code << place.shift);
    }
    store_f16(tile + code_bytes + scale_place(layout, key_bits, t), quantiser.scale_bits);
    store_f16(tile + code_bytes + zero_place(layout, key_bits, t), quantiser.zero_bits);
  }
}

void decode_estimate(IndexLayout layout, int key_bits, [[maybe_unused]] int page_size, int head_dim,
                     const std::byte* record, int slot, std::span<float> key) {
  check_key_bits("decode_estimate", key_bits, head_dim);
  TWILIGHT_DCHECK(slot >= 0 && slot < page_size);
  const std::byte* tile =
      record + slot / kEstimateTileTokens * estimate_tile_bytes(key_bits, head_dim);
  const int t = slot % kEstimateTileTokens;
  const std::int64_t code_bytes = estimate_code_bytes(key_bits, head_dim);
  const float scale = load_f16(tile + code_bytes + scale_place(layout, key_bits, t));
  const float zero = load_f16(tile + code_bytes + zero_place(layout, key_bits, t));
  const unsigned mask = key_bits == 4 ? 15U : 255U;
  for (int d = 0; d < head_dim; ++d) {
    const CodePlace place = code_place(layout, key_bits, head_dim, t, d);
    const unsigned code = (std::to_integer<unsigned>(tile[place.byte]) >> place.shift) & mask;
    key[static_cast<std::size_t>(d)] = scale * static_cast<float>(code) + zero;
  }
}

void encode_summary(SummaryKind kind, int page_size, int head_dim, std::span<const float> keys,
                    std::byte* record) {
  if (kind == SummaryKind::kNone) return;
  constexpr int kMaxHeadDim = 1024;
  require(head_dim > 0 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "encode_summary",
          "head_dim, got ", head_dim, ", accepted even numbers up to ", kMaxHeadDim);
  const auto dim = static_cast<std::size_t>(head_dim);
  float min_row[kMaxHeadDim];
  float max_row[kMaxHeadDim];
  for (std::size_t d = 0; d < dim; ++d) {
    Range range;
    for (std::size_t slot = 0; slot < static_cast<std::size_t>(page_size); ++slot) {
      range.add(keys[slot * dim + d]);
    }
    range = range.canonical();
    min_row[d] = range.lo;
    max_row[d] = range.hi;
  }
  if (kind == SummaryKind::kQuestBf16) {
    for (std::size_t d = 0; d < dim; ++d) {
      store_f16(record + 2 * d, bf16_floor(min_row[d]));
      store_f16(record + 2 * (dim + d), bf16_ceil(max_row[d]));
    }
    return;
  }
  std::byte* params = record + dim;
  encode_quest4_vector({min_row, dim}, record, params);
  encode_quest4_vector({max_row, dim}, record + dim / 2, params + 4);
  std::memset(params + 8, 0, 8);
}

void decode_quest_summary(SummaryKind kind, int head_dim, const std::byte* record,
                          std::span<float> min, std::span<float> max) {
  require(kind == SummaryKind::kQuestBf16 || kind == SummaryKind::kQuest4, "decode_quest_summary",
          "summary, got ", static_cast<int>(kind), ", accepted kQuestBf16 or kQuest4");
  const auto dim = static_cast<std::size_t>(head_dim);
  if (kind == SummaryKind::kQuestBf16) {
    for (std::size_t d = 0; d < dim; ++d) {
      std::uint16_t bits[2];
      std::memcpy(&bits[0], record + 2 * d, 2);
      std::memcpy(&bits[1], record + 2 * (dim + d), 2);
      min[d] = bf16_to_f32(bits[0]);
      max[d] = bf16_to_f32(bits[1]);
    }
    return;
  }
  const std::byte* params = record + dim;
  decode_quest4_vector(record, params, min.first(dim));
  decode_quest4_vector(record + dim / 2, params + 4, max.first(dim));
}

float estimate_error_bound(int key_bits, float lo, float hi) {
  const Quantiser quantiser(key_bits, lo, hi);
  const double scale = quantiser.scale;
  const double zero = quantiser.zero;
  const double top = zero + scale * static_cast<double>(quantiser.levels);
  const double bound = std::max({scale / 2, zero - lo, static_cast<double>(hi) - top});
  // f32: the difference and the quotient move a boundary between codes by 2^-23 of the range, the
  // decoded sum rounds once.
  const double rounding = 0x1p-23 * (std::abs(zero) + std::abs(top) + (top - zero));
  return std::nextafter(static_cast<float>(bound + rounding),
                        std::numeric_limits<float>::infinity());
}

}  // namespace twilight
