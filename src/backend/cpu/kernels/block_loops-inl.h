// Products with quantised weight blocks in plain loops, for sets without byte products: a block is
// decoded to bytes, steps and offsets, then multiplied in integers as elsewhere.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_LOOPS_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_LOOPS_INL_H_

#include "backend/cpu/kernels/blocks.h"
#include "backend/cpu/simd.h"
#include "core/float16.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

using Bytes = const std::uint8_t*;

// Up to 256 weights: step[i / 16] * code[i] + offset[i / 16]. Products are exact in f32.
struct BlockCodes {
  std::int8_t codes[256];
  float steps[16];
  float offsets[16];
};

inline float half_at(Bytes at) {
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return f16_to_f32(bits);
}

inline void set_runs(BlockCodes& out, int run, float step, float offset) {
  out.steps[run] = step;
  out.offsets[run] = offset;
}

// Nibbles at `low`, fifth bits in the word at `high` (null for none).
inline void block_of_32(Bytes low, Bytes high, float step, float offset, BlockCodes& out) {
  for (int i = 0; i < 32; ++i) {
    int code = i < 16 ? low[i] & 15 : low[i - 16] >> 4;
    if (high != nullptr) code |= ((high[i / 8] >> (i % 8)) & 1) << 4;
    out.codes[i] = static_cast<std::int8_t>(code);
  }
  set_runs(out, 0, step, offset);
  set_runs(out, 1, step, offset);
}

inline void decode_q2_k(Bytes b, BlockCodes& out) {
  const float d = half_at(b + 80);
  const float dmin = half_at(b + 82);
  for (int i = 0; i < 256; ++i) {
    const int at = 16 + i / 128 * 32 + i % 32;
    out.codes[i] = static_cast<std::int8_t>((b[at] >> (i % 128 / 32 * 2)) & 3);
  }
  for (int run = 0; run < 16; ++run) {
    set_runs(out, run, d * static_cast<float>(b[run] & 15),
             -dmin * static_cast<float>(b[run] >> 4));
  }
}

inline void decode_q3_k(Bytes b, BlockCodes& out) {
  const float d = half_at(b + 108);
  Bytes scales = b + 96;
  for (int i = 0; i < 256; ++i) {
    const int at = 32 + i / 128 * 32 + i % 32;
    const int low = (b[at] >> (i % 128 / 32 * 2)) & 3;
    out.codes[i] = static_cast<std::int8_t>(low | (((b[i % 32] >> (i / 32)) & 1) << 2));
  }
  for (int run = 0; run < 16; ++run) {
    const int low = run < 8 ? scales[run] & 15 : scales[run - 8] >> 4;
    const int high = (scales[8 + run % 4] >> (run / 4 * 2)) & 3;
    const float step = d * static_cast<float>((low | (high << 4)) - 32);
    set_runs(out, run, step, -4 * step);
  }
}

// Q4_K, and with `high` Q5_K.
inline void decode_q4_k(Bytes b, Bytes high, Bytes codes, BlockCodes& out) {
  const float d = half_at(b);
  const float dmin = half_at(b + 2);
  for (int i = 0; i < 256; ++i) {
    const int run = i / 32;
    int code = (codes[i / 64 * 32 + i % 32] >> (run % 2 * 4)) & 15;
    if (high != nullptr) code |= ((high[i % 32] >> run) & 1) << 4;
    out.codes[i] = static_cast<std::int8_t>(code);
  }
  Bytes p = b + 4;
  for (int run = 0; run < 8; ++run) {
    int scale = p[run] & 63;
    int min = p[run + 4] & 63;
    if (run >= 4) {
      scale = (p[run + 4] & 15) | (p[run - 4] >> 6 << 4);
      min = (p[run + 4] >> 4) | (p[run] >> 6 << 4);
    }
    for (int half = 0; half < 2; ++half) {
      set_runs(out, 2 * run + half, d * static_cast<float>(scale), -dmin * static_cast<float>(min));
    }
  }
}

inline void decode_q6_k(Bytes b, BlockCodes& out) {
  const float d = half_at(b + 208);
  for (int i = 0; i < 256; ++i) {
    const int part = i % 128 / 32;
    const int low = (b[i / 128 * 64 + i % 64] >> (part / 2 * 4)) & 15;
    const int high = (b[128 + i / 128 * 32 + i % 32] >> (2 * part)) & 3;
    out.codes[i] = static_cast<std::int8_t>(low | (high << 4));
  }
  for (int run = 0; run < 16; ++run) {
    const float step = d * static_cast<float>(static_cast<std::int8_t>(b[192 + run]));
    set_runs(out, run, step, -32 * step);
  }
}

template <WeightType kType>
inline void decode(Bytes b, BlockCodes& out) {
  const float d = half_at(b);
  if constexpr (kType == WeightType::kQ4_0) block_of_32(b + 2, nullptr, d, -8 * d, out);
  if constexpr (kType == WeightType::kQ4_1) block_of_32(b + 4, nullptr, d, half_at(b + 2), out);
  if constexpr (kType == WeightType::kQ5_0) block_of_32(b + 6, b + 2, d, -16 * d, out);
  if constexpr (kType == WeightType::kQ5_1) block_of_32(b + 8, b + 4, d, half_at(b + 2), out);
  if constexpr (kType == WeightType::kQ8_0) {
    std::memcpy(out.codes, b + 2, 32);
    set_runs(out, 0, d, 0);
    set_runs(out, 1, d, 0);
  }
  if constexpr (kType == WeightType::kQ2_K) decode_q2_k(b, out);
  if constexpr (kType == WeightType::kQ3_K) decode_q3_k(b, out);
  if constexpr (kType == WeightType::kQ4_K) decode_q4_k(b, nullptr, b + 16, out);
  if constexpr (kType == WeightType::kQ5_K) decode_q4_k(b, b + 16, b + 48, out);
  if constexpr (kType == WeightType::kQ6_K) decode_q6_k(b, out);
}

template <WeightType kType>
void dequantise_of(const std::byte* blocks, std::int64_t count, float* out) {
  constexpr int kLength = weight_block_length(kType);
  const auto* b = reinterpret_cast<Bytes>(blocks);
  BlockCodes block;
  for (std::int64_t i = 0; i < count; i += kLength, b += weight_block_bytes(kType)) {
    decode<kType>(b, block);
    for (int j = 0; j < kLength; ++j) {
      out[i + j] = static_cast<float>(block.codes[j]) * block.steps[j / 16] + block.offsets[j / 16];
    }
  }
}

// scales: a step for 32 weights; sums: step * sum of the codes of 16.
void quantise(WeightType /*type*/, const float* x, std::int64_t cols, std::byte* out) {
  const BlockInput in(out, cols);
  for (std::int64_t block = 0; block < cols / 32; ++block) {
    const float* from = x + 32 * block;
    std::int8_t* codes = in.codes + 32 * block;
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < 32; ++i) {
      largest = std::max(largest, std::abs(from[i]));
      finite = finite && std::isfinite(from[i]);
    }
    float step = 0;
    float inverse = 0;
    if (!finite) {
      step = std::numeric_limits<float>::quiet_NaN();
    } else if (largest >= 0x1p-100F) {
      step = largest / 127.0F;
      inverse = 127.0F / largest;
    }
    for (int half = 0; half < 2; ++half) {
      std::int32_t sum = 0;
      for (int i = 16 * half; i < 16 * half + 16; ++i) {
        codes[i] = static_cast<std::int8_t>(finite ? std::nearbyint(from[i] * inverse) : 0.0F);
        sum += codes[i];
      }
      in.sums[2 * block + half] = step * static_cast<float>(sum);
    }
    in.scales[block] = step;
  }
}

template <WeightType kType>
void matvec_of(const LinearParams& p, const std::byte* inputs, std::int64_t begin,
               std::int64_t end) {
  constexpr int kLength = weight_block_length(kType);
  constexpr int kAtOnce = 4;  // rows of activations a decoded block meets
  const std::int64_t cols = p.weight.cols;
  const std::int64_t row_bytes = weight_row_bytes(kType, cols);
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int32_t input = 0; input < p.num_rows; input += kAtOnce) {
      const std::int32_t count = std::min(kAtOnce, p.num_rows - input);
      const auto* b = reinterpret_cast<Bytes>(p.weight.data) + row * row_bytes;
      float sums[kAtOnce] = {};
      BlockCodes block;
      for (std::int64_t col = 0; col < cols; col += kLength, b += weight_block_bytes(kType)) {
        decode<kType>(b, block);
        for (std::int32_t m = 0; m < count; ++m) {
          const BlockInput in(
              const_cast<std::byte*>(inputs) + (input + m) * block_input_bytes(cols), cols);
          for (int run = 0; run < kLength / 16; ++run) {
            const std::int64_t at = col / 16 + run;
            std::int32_t dot = 0;
            for (int i = 0; i < 16; ++i) {
              dot += block.codes[16 * run + i] * in.codes[16 * at + i];
            }
            sums[m] += static_cast<float>(dot) * (block.steps[run] * in.scales[at / 2]);
            sums[m] += block.offsets[run] * in.sums[at];
          }
        }
      }
      for (std::int32_t m = 0; m < count; ++m) {
        float sum = sums[m];
        if (p.bias != nullptr) sum += p.bias[row];
        float& y = p.y[(input + m) * p.y_stride + row];
        y = p.accumulate ? y + sum : sum;
      }
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_LOOPS_INL_H_
