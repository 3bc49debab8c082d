#include "quant/weight_blocks.h"

#include <cstring>

#include "core/check.h"
#include "core/float16.h"

namespace twilight {
namespace {

// Scale times code is exact in f32 in every type (11 + 8 + 8 significant bits at most in Q6_K, of
// which codes use 6), so each value below is rounded once, by the sum or not at all.

std::uint16_t bits16(const std::uint8_t* at) {
  return static_cast<std::uint16_t>(at[0] | (at[1] << 8));
}

float half(const std::uint8_t* at) { return f16_to_f32(bits16(at)); }

void q8_0(const std::uint8_t* b, float* y) {
  const float d = half(b);
  for (int i = 0; i < 32; ++i) {
    y[i] = d * static_cast<float>(static_cast<std::int8_t>(b[2 + i]));
  }
}

// The 4- and 5-bit blocks: nibbles at `low`, fifth bits in the word at `high` (null for none).
void q4_q5(float d, float m, int offset, const std::uint8_t* low, const std::uint8_t* high,
           float* y) {
  for (int i = 0; i < 32; ++i) {
    int code = i < 16 ? low[i] & 15 : low[i - 16] >> 4;
    if (high != nullptr) code |= ((high[i / 8] >> (i % 8)) & 1) << 4;
    y[i] = d * static_cast<float>(code - offset) + m;
  }
}

void q2_k(const std::uint8_t* b, float* y) {
  const std::uint8_t* codes = b + 16;
  const float d = half(b + 80);
  const float dmin = half(b + 82);
  for (int i = 0; i < 256; ++i) {
    const int scale = b[i / 16];
    const int code = (codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
    y[i] = d * static_cast<float>((scale & 15) * code) - dmin * static_cast<float>(scale >> 4);
  }
}

void q3_k(const std::uint8_t* b, float* y) {
  const std::uint8_t* codes = b + 32;
  const std::uint8_t* scales = b + 96;
  const float d = half(b + 108);
  for (int i = 0; i < 256; ++i) {
    const int s = i / 16;
    const int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
    const int scale = (low | (((scales[8 + s % 4] >> (s / 4 * 2)) & 3) << 4)) - 32;
    const int third = (b[i % 32] >> (i / 32)) & 1;
    const int code = ((codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3) + 4 * third - 4;
    y[i] = d * static_cast<float>(scale * code);
  }
}

// Scale and minimum of the s-th 32 weights, 6 bits each.
struct ScaleMin {
  int scale, min;
};
ScaleMin scale_min(const std::uint8_t* p, int s) {
  if (s < 4) return {p[s] & 63, p[s + 4] & 63};
  return {(p[s + 4] & 15) | (p[s - 4] >> 6 << 4), (p[s + 4] >> 4) | (p[s] >> 6 << 4)};
}

// Q4_K, and with `high` Q5_K.
void q4_q5_k(const std::uint8_t* b, const std::uint8_t* high, const std::uint8_t* codes, float* y) {
  const float d = half(b);
  const float dmin = half(b + 2);
  for (int i = 0; i < 256; ++i) {
    const int s = i / 32;
    const auto [scale, min] = scale_min(b + 4, s);
    int code = (codes[i / 64 * 32 + i % 32] >> (s % 2 * 4)) & 15;
    if (high != nullptr) code |= ((high[i % 32] >> s) & 1) << 4;
    y[i] = d * static_cast<float>(scale * code) - dmin * static_cast<float>(min);
  }
}

void q6_k(const std::uint8_t* b, float* y) {
  const std::uint8_t* high = b + 128;
  const std::uint8_t* scales = b + 192;
  const float d = half(b + 208);
  for (int i = 0; i < 256; ++i) {
    const int part = i % 128 / 32;
    const int low = (b[i / 128 * 64 + i % 64] >> (part / 2 * 4)) & 15;
    const int code = (low | (((high[i / 128 * 32 + i % 32] >> (2 * part)) & 3) << 4)) - 32;
    y[i] = d * static_cast<float>(static_cast<std::int8_t>(scales[i / 16]) * code);
  }
}

void decode_block(WeightType type, const std::uint8_t* b, float* y) {
  switch (type) {
    case WeightType::kF32:
      std::memcpy(y, b, sizeof(*y));
      return;
    case WeightType::kF16:
      *y = half(b);
      return;
    case WeightType::kBf16:
      *y = bf16_to_f32(bits16(b));
      return;
    case WeightType::kQ4_0:
      return q4_q5(half(b), 0, 8, b + 2, nullptr, y);
    case WeightType::kQ4_1:
      return q4_q5(half(b), half(b + 2), 0, b + 4, nullptr, y);
    case WeightType::kQ5_0:
      return q4_q5(half(b), 0, 16, b + 6, b + 2, y);
    case WeightType::kQ5_1:
      return q4_q5(half(b), half(b + 2), 0, b + 8, b + 4, y);
    case WeightType::kQ8_0:
      return q8_0(b, y);
    case WeightType::kQ2_K:
      return q2_k(b, y);
    case WeightType::kQ3_K:
      return q3_k(b, y);
    case WeightType::kQ4_K:
      return q4_q5_k(b, nullptr, b + 16, y);
    case WeightType::kQ5_K:
      return q4_q5_k(b, b + 16, b + 48, y);
    case WeightType::kQ6_K:
      return q6_k(b, y);
  }
}

}  // namespace

std::string_view weight_type_name(WeightType type) {
  switch (type) {
    case WeightType::kF32:
      return "F32";
    case WeightType::kF16:
      return "F16";
    case WeightType::kBf16:
      return "BF16";
    case WeightType::kQ4_0:
      return "Q4_0";
    case WeightType::kQ4_1:
      return "Q4_1";
    case WeightType::kQ5_0:
      return "Q5_0";
    case WeightType::kQ5_1:
      return "Q5_1";
    case WeightType::kQ8_0:
      return "Q8_0";
    case WeightType::kQ2_K:
      return "Q2_K";
    case WeightType::kQ3_K:
      return "Q3_K";
    case WeightType::kQ4_K:
      return "Q4_K";
    case WeightType::kQ5_K:
      return "Q5_K";
    case WeightType::kQ6_K:
      return "Q6_K";
  }
  fail(ErrorCode::kInternal, "weight_type_name", "unknown type ", static_cast<int>(type));
}

void dequantise_row(WeightType type, const std::byte* row, std::span<float> values) {
  const auto length = static_cast<std::size_t>(weight_block_length(type));
  require(values.size() % length == 0, "dequantise", "weights a row, got ", values.size(),
          ", accepted multiples of ", length, " in ", weight_type_name(type));
  const auto* block = reinterpret_cast<const std::uint8_t*>(row);
  for (std::size_t i = 0; i < values.size(); i += length) {
    decode_block(type, block, values.data() + i);
    block += weight_block_bytes(type);
  }
}

}  // namespace twilight
