// Products of quantised weight blocks with activations in bytes (x86 sets). A vector is 32 weights:
// bytes multiply into 8 sums of 4, which widen to f32 and meet the block's step.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_DOT_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_DOT_INL_H_

#include "backend/cpu/kernels/block_codes-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// What a type's products read beside the codes of the activations, with s the step of 32 of them
// and c their codes:
//   Q8_0                scales s
//   Q4_0, Q5_0          scales s; sums, as int32, minus centre / 8 sum c, the start of each of the
//   8
//                       integer sums
//   Q4_1, Q5_1          scales: pairs s, s sum c
//   Q4_K, Q5_K          scales s, sums s sum c
//   Q2_K, Q3_K, Q6_K    a number for 16 weights: scales s, sums s sum c
void store_input_block(WeightType type, float step, std::int32_t first, std::int32_t second,
                       std::int64_t block, const BlockInput& in) {
  const std::int32_t sum = first + second;
  switch (type) {
    case WeightType::kQ4_0:
    case WeightType::kQ5_0: {
      const std::int32_t start = type == WeightType::kQ4_0 ? -sum : -2 * sum;
      in.scales[block] = step;
      std::memcpy(in.sums + block, &start, sizeof(start));
      return;
    }
    case WeightType::kQ4_1:
    case WeightType::kQ5_1:
      in.scales[2 * block] = step;
      in.scales[2 * block + 1] = step * static_cast<float>(sum);
      return;
    case WeightType::kQ2_K:
    case WeightType::kQ3_K:
    case WeightType::kQ6_K:
      in.scales[2 * block] = step;
      in.scales[2 * block + 1] = step;
      in.sums[2 * block] = step * static_cast<float>(first);
      in.sums[2 * block + 1] = step * static_cast<float>(second);
      return;
    default:
      in.scales[block] = step;
      in.sums[block] = step * static_cast<float>(sum);
      return;
  }
}

HWY_INLINE std::int32_t sum_of_lanes(__m256i v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

void quantise(WeightType type, const float* x, std::int64_t cols, std::byte* out) {
  const BlockInput in(out, cols);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (std::int64_t block = 0; block < cols / 32; ++block) {
    const float* from = x + 32 * block;
    __m256i most = _mm256_setzero_si256();
    for (int v = 0; v < 4; ++v) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(from + 8 * v));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 1));
    const std::int32_t bits = _mm_cvtsi128_si32(four);
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    auto* codes = reinterpret_cast<__m256i*>(in.codes + 32 * block);
    if (bits >= 0x7f800000 || largest < 0x1p-100F) {
      const bool finite = bits < 0x7f800000;
      _mm256_storeu_si256(codes, _mm256_setzero_si256());
      store_input_block(type, finite ? 0.0F : std::numeric_limits<float>::quiet_NaN(), 0, 0, block,
                        in);
      continue;
    }
    const __m256 inverse = _mm256_set1_ps(127.0F / largest);
    __m256i c[4];
    for (int v = 0; v < 4; ++v) {
      c[v] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * v), inverse));
    }
    // Packing works within 128-bit lanes; the permutation puts words back in order.
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    _mm256_storeu_si256(
        codes, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    store_input_block(type, largest / 127.0F, sum_of_lanes(_mm256_add_epi32(c[0], c[1])),
                      sum_of_lanes(_mm256_add_epi32(c[2], c[3])), block, in);
  }
}

// start + sums of four products of unsigned and signed bytes. Without VNNI pairs add in 16 bits: at
// most 2 * 128 * 127, which fits.
HWY_INLINE __m256 dot_bytes(__m256i start, __m256i codes, __m256i input) {
#if TWILIGHT_HAS_VNNI
  return _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(start, codes, input));
#else
  const __m256i pairs = _mm256_maddubs_epi16(codes, input);
  return _mm256_cvtepi32_ps(
      _mm256_add_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
#endif
}

HWY_INLINE float sum_of_lanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Sums of kRows weight rows with kInputs rows of activations. Even and odd vectors have sums of
// their own; the order of a sum does not depend on kRows and kInputs.
template <int kRows, int kInputs>
struct Sums {
  __m256 products[kRows][kInputs][2];
  __m256 offsets[kRows][kInputs];
};

template <WeightType kType, int kRows, int kInputs>
HWY_INLINE void add_blocks(const Bytes* rows, std::int64_t at, const BlockInput* in,
                           std::int64_t block, int side, Sums<kRows, kInputs>& sums) {
  __m256i codes[kRows];
  __m256 steps[kRows];  // with minima in odd lanes where there are any
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    codes[r] = block_codes<kType>(rows[r] + at);
    steps[r] = kHasMinimum<kType> ? half_pairs(rows[r] + at) : halves(rows[r] + at);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kInputs; ++m) {
    const __m256i input = load256(in[m].codes + 32 * block);
    if constexpr (kHasMinimum<kType>) {
      const __m256 pair = _mm256_castpd_ps(
          _mm256_broadcast_sd(reinterpret_cast<const double*>(in[m].scales + 2 * block)));
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const __m256 both = _mm256_mul_ps(steps[r], pair);
        const __m256 dot = dot_bytes(_mm256_setzero_si256(), codes[r], input);
        __m256& sum = sums.products[r][m][side];
        sum = _mm256_fmadd_ps(dot, _mm256_moveldup_ps(both), sum);
        sums.offsets[r][m] = _mm256_add_ps(sums.offsets[r][m], both);  // odd lanes
      }
    } else {
      const __m256 scale = _mm256_broadcast_ss(in[m].scales + block);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        __m256 dot;
        if constexpr (kType == WeightType::kQ8_0) {
          dot = dot_bytes(_mm256_setzero_si256(), _mm256_abs_epi8(codes[r]),
                          _mm256_sign_epi8(input, codes[r]));
        } else {
          const __m256 start = _mm256_broadcast_ss(in[m].sums + block);
          dot = dot_bytes(_mm256_castps_si256(start), codes[r], input);
        }
        __m256& sum = sums.products[r][m][side];
        sum = _mm256_fmadd_ps(dot, _mm256_mul_ps(steps[r], scale), sum);
      }
    }
  }
}

// One vector of a block of 256; `steps` are the blocks', times those of the activations.
template <WeightType kType, int kPart, int kRows, int kInputs>
HWY_INLINE void add_part(const Bytes* rows, std::int64_t at, const BlockInput* in,
                         std::int64_t block, const float (*steps)[kInputs][16],
                         Sums<kRows, kInputs>& sums) {
  __m256i codes[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) codes[r] = run_codes<kType, kPart>(rows[r] + at);
#pragma GCC unroll 4
  for (int m = 0; m < kInputs; ++m) {
    const __m256i input = load256(in[m].codes + 256 * block + 32 * kPart);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const __m256 dot = dot_bytes(_mm256_setzero_si256(), codes[r], input);
      __m256 scale;
      if constexpr (kRunsOf32<kType>) {
        scale = _mm256_broadcast_ss(steps[r][m] + kPart);
      } else {
        constexpr int kFirst = kPart % 4 * 2;
        const __m256i lanes = _mm256_setr_epi32(kFirst, kFirst, kFirst, kFirst, kFirst + 1,
                                                kFirst + 1, kFirst + 1, kFirst + 1);
        scale = _mm256_permutevar8x32_ps(_mm256_load_ps(steps[r][m] + 8 * (kPart / 4)), lanes);
      }
      __m256& sum = sums.products[r][m][kPart % 2];
      sum = _mm256_fmadd_ps(dot, scale, sum);
    }
  }
}

template <WeightType kType, int kRows, int kInputs>
HWY_INLINE void add_runs(const Bytes* rows, std::int64_t at, const BlockInput* in,
                         std::int64_t block, Sums<kRows, kInputs>& sums) {
  constexpr int kVectors = kRunsOf32<kType> ? 1 : 2;
  alignas(32) float steps[kRows][kInputs][16];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const RunScales scales = run_scales<kType>(rows[r] + at);
#pragma GCC unroll 4
    for (int m = 0; m < kInputs; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t first = 8 * (kVectors * block + v);
        _mm256_store_ps(steps[r][m] + 8 * v,
                        _mm256_mul_ps(scales.step[v], _mm256_loadu_ps(in[m].scales + first)));
        sums.offsets[r][m] = _mm256_fmadd_ps(scales.offset[v], _mm256_loadu_ps(in[m].sums + first),
                                             sums.offsets[r][m]);
      }
    }
  }
  add_part<kType, 0, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 1, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 2, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 3, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 4, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 5, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 6, kRows, kInputs>(rows, at, in, block, steps, sums);
  add_part<kType, 7, kRows, kInputs>(rows, at, in, block, steps, sums);
}

// Rows side by side are two streams for the processor, which then prefetches too little: at half
// the bandwidth. So their bytes, which lie one after the other, are asked for in order, this far
// ahead, but not past `end`, where another thread's rows begin.
constexpr std::int64_t kAhead = 4096;

template <int kBytes>
HWY_INLINE void prefetch(Bytes from, Bytes end) {
  const Bytes at = std::min(from + kAhead, end - kBytes);
#pragma GCC unroll 16
  for (int i = 0; i < kBytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(at + i), _MM_HINT_T0);
  }
}

// Output rows [row, row + kRows) of rows of activations [input, input + kInputs).
template <WeightType kType, int kRows, int kInputs>
HWY_INLINE void dot_rows(const LinearParams& p, const std::byte* inputs, std::int64_t row,
                         std::int64_t row_end, std::int32_t input) {
  constexpr int kBytes = weight_block_bytes(kType);
  const std::int64_t cols = p.weight.cols;
  const std::int64_t row_bytes = weight_row_bytes(kType, cols);
  Bytes rows[kRows];
  BlockInput in[kInputs];
  Sums<kRows, kInputs> sums;
  for (int r = 0; r < kRows; ++r) {
    rows[r] = reinterpret_cast<Bytes>(p.weight.data) + (row + r) * row_bytes;
    for (int m = 0; m < kInputs; ++m) {
      sums.products[r][m][0] = _mm256_setzero_ps();
      sums.products[r][m][1] = _mm256_setzero_ps();
      sums.offsets[r][m] = _mm256_setzero_ps();
    }
  }
  for (int m = 0; m < kInputs; ++m) {
    in[m] =
        BlockInput(const_cast<std::byte*>(inputs) + (input + m) * block_input_bytes(cols), cols);
  }
  const Bytes end = reinterpret_cast<Bytes>(p.weight.data) + row_end * row_bytes;
  const std::int64_t blocks = cols / weight_block_length(kType);
  std::int64_t block = 0;
  if constexpr (weight_block_length(kType) == 32) {
    for (; block + 2 <= blocks; block += 2) {
      prefetch<2 * kRows * kBytes>(rows[0] + kRows * block * kBytes, end);
      add_blocks<kType, kRows, kInputs>(rows, block * kBytes, in, block, 0, sums);
      add_blocks<kType, kRows, kInputs>(rows, (block + 1) * kBytes, in, block + 1, 1, sums);
    }
    if (block < blocks) {
      add_blocks<kType, kRows, kInputs>(rows, block * kBytes, in, block, 0, sums);
    }
  } else {
    for (; block < blocks; ++block) {
      prefetch<kRows * kBytes>(rows[0] + kRows * block * kBytes, end);
      add_runs<kType, kRows, kInputs>(rows, block * kBytes, in, block, sums);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < kInputs; ++m) {
      float sum = sum_of_lanes(_mm256_add_ps(sums.products[r][m][0], sums.products[r][m][1]));
      if constexpr (kHasMinimum<kType>) {
        sum += _mm256_cvtss_f32(_mm256_movehdup_ps(sums.offsets[r][m]));
      } else if constexpr (weight_block_length(kType) != 32) {
        sum += sum_of_lanes(sums.offsets[r][m]);
      }
      if (p.bias != nullptr) sum += p.bias[row + r];
      float& y = p.y[(input + m) * p.y_stride + row + r];
      y = p.accumulate ? y + sum : sum;
    }
  }
}

template <WeightType kType, int kRows>
HWY_INLINE void dot_all_inputs(const LinearParams& p, const std::byte* inputs, std::int64_t row,
                               std::int64_t end) {
  std::int32_t input = 0;
  for (; input + 4 <= p.num_rows; input += 4) dot_rows<kType, kRows, 4>(p, inputs, row, end, input);
  if (input + 2 <= p.num_rows) {
    dot_rows<kType, kRows, 2>(p, inputs, row, end, input);
    input += 2;
  }
  if (input < p.num_rows) dot_rows<kType, kRows, 1>(p, inputs, row, end, input);
}

template <WeightType kType>
void matvec_of(const LinearParams& p, const std::byte* inputs, std::int64_t begin,
               std::int64_t end) {
  std::int64_t row = begin;
  for (; row + 2 <= end; row += 2) dot_all_inputs<kType, 2>(p, inputs, row, end);
  if (row < end) dot_all_inputs<kType, 1>(p, inputs, row, end);
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_BLOCK_DOT_INL_H_
