// Quantised weight blocks as vectors of 32 bytes: codes, steps and offsets, so that
// weight = step * code + offset with exact products (x86 sets). Byte layouts: docs/formats.md.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_CODES_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_CODES_INL_H_

#include "backend/cpu/kernels/blocks.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

using Bytes = const std::uint8_t*;

HWY_INLINE std::uint16_t load16(Bytes at) {
  std::uint16_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}
HWY_INLINE std::int32_t load32(Bytes at) {
  std::int32_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}
HWY_INLINE __m256i load256(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

// The f16 at `at` in all lanes.
HWY_INLINE __m256 halves(Bytes at) {
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<std::int16_t>(load16(at))));
}
// Two neighbouring f16 in even and odd lanes.
HWY_INLINE __m256 half_pairs(Bytes at) { return _mm256_cvtph_ps(_mm_set1_epi32(load32(at))); }

// Bit `from` of every byte moved to bit `to`, the others cleared.
template <int kFrom, int kTo>
HWY_INLINE __m256i move_bit(__m256i v) {
  if constexpr (kFrom > kTo) v = _mm256_srli_epi16(v, kFrom - kTo);
  if constexpr (kFrom < kTo) v = _mm256_slli_epi16(v, kTo - kFrom);
  return _mm256_and_si256(v, _mm256_set1_epi8(1 << kTo));
}

// --- blocks of 32 -----------------------------------------------------------------------------

// 16 bytes of nibbles: low halves, then high halves.
HWY_INLINE __m256i nibbles(Bytes at) {
  const __m256i both =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  const __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
  return _mm256_and_si256(_mm256_srlv_epi32(both, shifts), _mm256_set1_epi8(15));
}

// Bit i of the word at `at` as 16 or 0 in byte i.
HWY_INLINE __m256i fifth_bits(Bytes at) {
#if HWY_TARGET == HWY_AVX3
  return _mm256_maskz_mov_epi8(static_cast<__mmask32>(load32(at)), _mm256_set1_epi8(16));
#else
  const __m256i word = _mm256_set1_epi32(load32(at));
  const __m256i spread = _mm256_shuffle_epi8(
      word, _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const auto bit = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201ULL));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
#endif
}

template <WeightType kType>
constexpr bool kHasMinimum = kType == WeightType::kQ4_1 || kType == WeightType::kQ5_1;

// What is taken off every code of a block that has no minimum of its own.
template <WeightType kType>
constexpr int kCentre = kType == WeightType::kQ4_0   ? 8
                        : kType == WeightType::kQ5_0 ? 16
                                                     : 0;

// 32 codes: unsigned, signed in Q8_0.
template <WeightType kType>
HWY_INLINE __m256i block_codes(Bytes b) {
  if constexpr (kType == WeightType::kQ8_0) return load256(b + 2);
  if constexpr (kType == WeightType::kQ4_0) return nibbles(b + 2);
  if constexpr (kType == WeightType::kQ4_1) return nibbles(b + 4);
  if constexpr (kType == WeightType::kQ5_0) {
    return _mm256_or_si256(nibbles(b + 6), fifth_bits(b + 2));
  }
  if constexpr (kType == WeightType::kQ5_1) {
    return _mm256_or_si256(nibbles(b + 8), fifth_bits(b + 4));
  }
}

// --- blocks of 256 ----------------------------------------------------------------------------

template <WeightType kType>
constexpr bool kRunsOf32 = kType == WeightType::kQ4_K || kType == WeightType::kQ5_K;

// Steps and offsets of 8 runs of 32 weights (the first vectors alone) or 16 runs of 16.
struct RunScales {
  __m256 step[2];
  __m256 offset[2];
};

HWY_INLINE __m256 widen_unsigned(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
HWY_INLINE __m256 widen_signed(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
HWY_INLINE __m128i upper_half(__m128i v) { return _mm_unpackhi_epi64(v, v); }

// Steps d * s of 16 signed bytes, offsets -centre times those.
HWY_INLINE RunScales signed_runs(Bytes d, __m128i s, float centre) {
  const __m256 step = halves(d);
  const __m256 minus = _mm256_set1_ps(-centre);
  RunScales out;
  out.step[0] = _mm256_mul_ps(step, widen_signed(s));
  out.step[1] = _mm256_mul_ps(step, widen_signed(upper_half(s)));
  out.offset[0] = _mm256_mul_ps(minus, out.step[0]);
  out.offset[1] = _mm256_mul_ps(minus, out.step[1]);
  return out;
}

template <WeightType kType>
HWY_INLINE RunScales run_scales(Bytes b) {
  if constexpr (kType == WeightType::kQ6_K) {
    return signed_runs(b + 208, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 192)), 32);
  } else if constexpr (kType == WeightType::kQ3_K) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + 96));
    const __m128i four = _mm_set1_epi8(15);
    const __m128i nibble =
        _mm_unpacklo_epi64(_mm_and_si128(low, four), _mm_and_si128(_mm_srli_epi16(low, 4), four));
    const __m128i pairs =
        _mm_srlv_epi32(_mm_set1_epi32(load32(b + 104)), _mm_setr_epi32(0, 2, 4, 6));
    const __m128i high = _mm_slli_epi16(_mm_and_si128(pairs, _mm_set1_epi8(3)), 4);
    return signed_runs(b + 108, _mm_sub_epi8(_mm_or_si128(nibble, high), _mm_set1_epi8(32)), 4);
  } else if constexpr (kType == WeightType::kQ2_K) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    const __m128i four = _mm_set1_epi8(15);
    const __m128i s = _mm_and_si128(both, four);
    const __m128i n = _mm_and_si128(_mm_srli_epi16(both, 4), four);
    const __m256 d = halves(b + 80);
    const __m256 minus_min = _mm256_xor_ps(halves(b + 82), _mm256_set1_ps(-0.0F));
    RunScales out;
    out.step[0] = _mm256_mul_ps(d, widen_unsigned(s));
    out.step[1] = _mm256_mul_ps(d, widen_unsigned(upper_half(s)));
    out.offset[0] = _mm256_mul_ps(minus_min, widen_unsigned(n));
    out.offset[1] = _mm256_mul_ps(minus_min, widen_unsigned(upper_half(n)));
    return out;
  } else {
    // 12 bytes of 6-bit scales and minima, see docs/formats.md.
    const auto w0 = static_cast<std::uint32_t>(load32(b + 4));
    const auto w1 = static_cast<std::uint32_t>(load32(b + 8));
    const auto w2 = static_cast<std::uint32_t>(load32(b + 12));
    const std::uint32_t s_high = (w2 & 0x0f0f0f0fU) | ((w0 >> 2) & 0x30303030U);
    const std::uint32_t n_high = ((w2 >> 4) & 0x0f0f0f0fU) | ((w1 >> 2) & 0x30303030U);
    const auto pack = [](std::uint32_t low, std::uint32_t high) HWY_ATTR {
      return _mm_cvtsi64_si128(
          static_cast<std::int64_t>((std::uint64_t{high} << 32) | (low & 0x3f3f3f3fU)));
    };
    RunScales out;
    out.step[0] = _mm256_mul_ps(halves(b), widen_unsigned(pack(w0, s_high)));
    out.offset[0] = _mm256_mul_ps(_mm256_xor_ps(halves(b + 2), _mm256_set1_ps(-0.0F)),
                                  widen_unsigned(pack(w1, n_high)));
    out.step[1] = out.step[0];
    out.offset[1] = out.offset[0];
    return out;
  }
}

// Codes of weights 32 kPart to 32 kPart + 31, unsigned.
template <WeightType kType, int kPart>
HWY_INLINE __m256i run_codes(Bytes b) {
  constexpr int kHalf = kPart / 4;
  constexpr int kQuarter = kPart % 4;
  const __m256i low4 = _mm256_set1_epi8(15);
  if constexpr (kType == WeightType::kQ6_K) {
    __m256i low = load256(b + 64 * kHalf + 32 * (kQuarter % 2));
    if constexpr (kQuarter >= 2) low = _mm256_srli_epi16(low, 4);
    __m256i high = load256(b + 128 + 32 * kHalf);
    if constexpr (kQuarter < 2) high = _mm256_slli_epi16(high, 4 - 2 * kQuarter);
    if constexpr (kQuarter > 2) high = _mm256_srli_epi16(high, 2);
    return _mm256_or_si256(_mm256_and_si256(low, low4),
                           _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
  } else if constexpr (kType == WeightType::kQ3_K || kType == WeightType::kQ2_K) {
    constexpr int kAt = kType == WeightType::kQ3_K ? 32 : 16;
    const __m256i bytes = load256(b + kAt + 32 * kHalf);
    const __m256i two =
        _mm256_and_si256(_mm256_srli_epi16(bytes, 2 * kQuarter), _mm256_set1_epi8(3));
    if constexpr (kType == WeightType::kQ2_K) return two;
    return _mm256_or_si256(two, move_bit<kPart, 2>(load256(b)));
  } else {
    constexpr int kAt = kType == WeightType::kQ5_K ? 48 : 16;
    __m256i bytes = load256(b + kAt + 32 * (kPart / 2));
    if constexpr (kPart % 2 == 1) bytes = _mm256_srli_epi16(bytes, 4);
    bytes = _mm256_and_si256(bytes, low4);
    if constexpr (kType == WeightType::kQ4_K) return bytes;
    return _mm256_or_si256(bytes, move_bit<kPart, 4>(load256(b + 16)));
  }
}

// --- f32 --------------------------------------------------------------------------------------

// Eight weights from eight codes at `codes`.
template <bool kSigned>
HWY_INLINE void store_weights(const std::uint8_t* codes, __m256 step, __m256 offset, float* out) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m256 wide = kSigned ? widen_signed(bytes) : widen_unsigned(bytes);
  _mm256_storeu_ps(out, _mm256_fmadd_ps(wide, step, offset));
}

template <WeightType kType>
HWY_INLINE void dequantise_block(Bytes b, float* out) {
  alignas(32) std::uint8_t codes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(codes), block_codes<kType>(b));
  __m256 step = halves(b);
  __m256 offset = _mm256_mul_ps(step, _mm256_set1_ps(-static_cast<float>(kCentre<kType>)));
  if constexpr (kHasMinimum<kType>) offset = halves(b + 2);
  for (int i = 0; i < 32; i += 8) {
    store_weights<kType == WeightType::kQ8_0>(codes + i, step, offset, out + i);
  }
}

template <WeightType kType, int kPart>
HWY_INLINE void dequantise_part(Bytes b, const float* steps, const float* offsets, float* out) {
  alignas(32) std::uint8_t codes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(codes), run_codes<kType, kPart>(b));
  for (int i = 0; i < 32; i += 8) {
    const int run = kRunsOf32<kType> ? kPart : 2 * kPart + i / 16;
    store_weights<false>(codes + i, _mm256_set1_ps(steps[run]), _mm256_set1_ps(offsets[run]),
                         out + 32 * kPart + i);
  }
}

template <WeightType kType>
void dequantise_of(const std::byte* blocks, std::int64_t count, float* out) {
  const auto* b = reinterpret_cast<Bytes>(blocks);
  constexpr int kLength = weight_block_length(kType);
  for (std::int64_t i = 0; i < count; i += kLength, b += weight_block_bytes(kType)) {
    if constexpr (kLength == 32) {
      dequantise_block<kType>(b, out + i);
    } else {
      const RunScales scales = run_scales<kType>(b);
      float steps[16];
      float offsets[16];
      for (int v = 0; v < 2; ++v) {
        _mm256_storeu_ps(steps + 8 * v, scales.step[v]);
        _mm256_storeu_ps(offsets + 8 * v, scales.offset[v]);
      }
      dequantise_part<kType, 0>(b, steps, offsets, out + i);
      dequantise_part<kType, 1>(b, steps, offsets, out + i);
      dequantise_part<kType, 2>(b, steps, offsets, out + i);
      dequantise_part<kType, 3>(b, steps, offsets, out + i);
      dequantise_part<kType, 4>(b, steps, offsets, out + i);
      dequantise_part<kType, 5>(b, steps, offsets, out + i);
      dequantise_part<kType, 6>(b, steps, offsets, out + i);
      dequantise_part<kType, 7>(b, steps, offsets, out + i);
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_CODES_INL_H_
