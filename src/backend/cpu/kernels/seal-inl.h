// Writing the cache and its index: rounding of new rows, records of full pages.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_SEAL_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_SEAL_INL_H_

#include "backend/cpu/kernels/index_math-inl.h"
#include "backend/cpu/kernels/seal_rotated-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

using SealU32 = hn::Vec<hn::RebindToUnsigned<IndexF>>;

// f32_to_bf16 and f32_to_f16 of core/float16.h, bit for bit, in the low halves of the lanes.
HWY_INLINE SealU32 encode_bf16(IndexVec v) {
  const hn::RebindToUnsigned<IndexF> du32;
  const SealU32 bits = hn::BitCast(du32, v);
  const SealU32 high = hn::ShiftRight<16>(bits);
  const SealU32 odd = hn::And(high, hn::Set(du32, 1));
  const SealU32 rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du32, 0x7fff)), odd));
  const SealU32 magnitude = hn::And(bits, hn::Set(du32, 0x7fffffff));
  return hn::IfThenElse(hn::Gt(magnitude, hn::Set(du32, 0x7f800000)),
                        hn::Or(high, hn::Set(du32, 0x40)), rounded);
}

HWY_INLINE SealU32 encode_f16(IndexVec v) {
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  const SealU32 bits = hn::BitCast(du32, v);
  const SealU32 sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 0x8000));
  const SealU32 magnitude = hn::And(bits, hn::Set(du32, 0x7fffffff));
  const SealU32 odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du32, 1));
  const SealU32 rounded = hn::Add(hn::Add(magnitude, hn::Set(du32, 0xfff)), odd);
  const SealU32 normal = hn::ShiftRight<13>(hn::Sub(rounded, hn::Set(du32, 0x38000000)));
  const SealU32 subnormal =
      hn::Sub(hn::BitCast(du32, hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5F))),
              hn::Set(du32, 0x3f000000));
  SealU32 half = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du32, 0x38800000)), subnormal, normal);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du32, 0x477fefff)), hn::Set(du32, 0x7c00), half);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du32, 0x7f800000)), hn::Set(du32, 0x7e00), half);
  return hn::Or(sign, half);
}

HWY_INLINE void store_halves(SealU32 halves, std::byte* to) {
  const hn::Rebind<std::uint16_t, IndexF> du16;
  hn::StoreU(hn::TruncateTo(du16, halves), du16, reinterpret_cast<std::uint16_t*>(to));
}

void convert_row(DType dtype, const float* from, std::int64_t count, std::byte* to) {
  if (dtype == DType::kF32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const IndexF df;
  std::int64_t i = 0;
  for (; i + kIndexLanes <= count; i += kIndexLanes) {
    const IndexVec v = hn::LoadU(df, from + i);
    store_halves(dtype == DType::kBf16 ? encode_bf16(v) : encode_f16(v), to + 2 * i);
  }
  for (; i < count; ++i) {
    const std::uint16_t half = dtype == DType::kBf16 ? f32_to_bf16(from[i]) : f32_to_f16(from[i]);
    std::memcpy(to + 2 * i, &half, sizeof(half));
  }
}

// --- seal -------------------------------------------------------------------------------------

// As std::min(acc, x) and std::max(acc, x): NaN is passed over.
HWY_INLINE IndexVec min_of(IndexVec acc, IndexVec x) {
  return hn::IfThenElse(hn::Lt(x, acc), x, acc);
}
HWY_INLINE IndexVec max_of(IndexVec acc, IndexVec x) {
  return hn::IfThenElse(hn::Gt(x, acc), x, acc);
}

// Min and max of a vector's channels, zeros as +0.
struct SealRange {
  float lo;
  float hi;
};

HWY_INLINE SealRange reduce_range(IndexVec lo, IndexVec hi) {
  const IndexF df;
  return {hn::GetLane(hn::MinOfLanes(df, lo)) + 0.0F, hn::GetLane(hn::MaxOfLanes(df, hi)) + 0.0F};
}

// Scales and zeros of 16 vectors (f16), from their ranges.
HWY_INLINE void encode_parameters(float levels, const float* lo, const float* hi, std::byte* scales,
                                  std::byte* zeros) {
  const IndexF df;
  const IndexVec top = hn::Set(df, 65504.0F);
  const IndexVec bottom = hn::Set(df, -65504.0F);
  for (int i = 0; i < kEstimateTileTokens; i += kIndexLanes) {
    const IndexVec zero = hn::Load(df, lo + i);
    const IndexVec scale = hn::Div(hn::Sub(hn::Load(df, hi + i), zero), hn::Set(df, levels));
    store_halves(encode_f16(min_of(max_of(scale, bottom), top)), scales + 2 * i);
    store_halves(encode_f16(min_of(max_of(zero, bottom), top)), zeros + 2 * i);
  }
}

// Codes of one vector. Clamping comes before rounding, which gives the same codes as after; the
// addition of 2^23 rounds to nearest even and leaves the code in the low byte.
HWY_INLINE void encode_codes(const float* values, std::int64_t head_dim, float levels, float scale,
                             float zero, std::uint8_t* codes) {
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Rebind<std::uint8_t, IndexF> du8;
  if (scale == 0.0F) {
    std::memset(codes, 0, static_cast<std::size_t>(head_dim));
    return;
  }
  const IndexVec vscale = hn::Set(df, scale);
  const IndexVec vzero = hn::Set(df, zero);
  const IndexVec top = hn::Set(df, levels);
  const IndexVec magic = hn::Set(df, 8388608.0F);
  for (std::int64_t d = 0; d < head_dim; d += kIndexLanes) {
    const IndexVec steps = hn::Div(hn::Sub(hn::Load(df, values + d), vzero), vscale);
    const IndexVec positive = hn::IfThenElseZero(hn::Gt(steps, hn::Zero(df)), steps);
    const IndexVec code = hn::Add(min_of(positive, top), magic);
    hn::StoreU(hn::TruncateTo(du8, hn::BitCast(du32, code)), du8, codes + d);
  }
}

// Memory of one page's sealing, carved from the caller's scratch.
struct SealScratch {
  float* keys;          // [16, D]
  float* min;           // [D] over the page's tokens
  float* max;           // [D]
  std::uint8_t* codes;  // [D] of one token
};

inline SealScratch seal_scratch(std::int64_t head_dim, std::byte* scratch) {
  auto* keys = reinterpret_cast<float*>(scratch);
  float* min = keys + kEstimateTileTokens * head_dim;
  float* max = min + head_dim;
  return {keys, min, max, reinterpret_cast<std::uint8_t*>(max + head_dim)};
}

// Rows of one tile as f32, their ranges, and the page's bounds so far.
template <DType kType>
HWY_INLINE void read_tile(const std::byte* rows, std::int64_t row_bytes, int count,
                          std::int64_t head_dim, const SealScratch& s, float* lo, float* hi) {
  const IndexF df;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int t = 0; t < count; ++t, rows += row_bytes) {
    float* key = s.keys + t * head_dim;
    IndexVec low = hn::Set(df, kInfinity);
    IndexVec high = hn::Set(df, -kInfinity);
    for (std::int64_t d = 0; d < head_dim; d += kIndexLanes) {
      const IndexVec v = load_row<kType>(rows, d);
      hn::Store(v, df, key + d);
      low = min_of(low, v);
      high = max_of(high, v);
      hn::Store(min_of(hn::Load(df, s.min + d), v), df, s.min + d);
      hn::Store(max_of(hn::Load(df, s.max + d), v), df, s.max + d);
    }
    const SealRange range = reduce_range(low, high);
    lo[t] = range.lo;
    hi[t] = range.hi;
  }
}

template <int kBits>
HWY_INLINE void encode_tile(const SealScratch& s, std::int64_t head_dim, int count, const float* lo,
                            const float* hi, std::byte* tile) {
  constexpr float kLevels = (1 << kBits) - 1;
  const std::int64_t code_bytes = estimate_code_bytes(kBits, static_cast<int>(head_dim));
  std::byte* scales = tile + code_bytes;
  std::byte* zeros = scales + 2 * kEstimateTileTokens;
  if (count < kEstimateTileTokens) {
    std::memset(tile, 0, static_cast<std::size_t>(code_bytes));
  }
  encode_parameters(kLevels, lo, hi, scales, zeros);
  for (int t = 0; t < count; ++t) {
    std::uint16_t scale = 0;
    std::uint16_t zero = 0;
    std::memcpy(&scale, scales + 2 * t, 2);
    std::memcpy(&zero, zeros + 2 * t, 2);
    encode_codes(s.keys + t * head_dim, head_dim, kLevels, f16_to_f32(scale), f16_to_f32(zero),
                 s.codes);
    std::byte* column = tile + 4 * t;
    for (std::int64_t d = 0; d < head_dim; d += 32 / kBits, column += 64) {
      std::uint32_t word = 0;
      if constexpr (kBits == 4) {
        std::uint64_t pair = 0;
        std::memcpy(&pair, s.codes + d, sizeof(pair));
        word = static_cast<std::uint32_t>(pair) | static_cast<std::uint32_t>(pair >> 28);
      } else {
        std::memcpy(&word, s.codes + d, sizeof(word));
      }
      std::memcpy(column, &word, sizeof(word));
    }
  }
}

// One side of a kQuest4 record: codes, then scale and zero.
HWY_INLINE void encode_quest4_side(const float* bounds, std::int64_t head_dim, std::uint8_t* codes,
                                   std::byte* packed, std::byte* parameters) {
  const IndexF df;
  IndexVec low = hn::Load(df, bounds);
  IndexVec high = low;
  for (std::int64_t d = kIndexLanes; d < head_dim; d += kIndexLanes) {
    low = min_of(low, hn::Load(df, bounds + d));
    high = max_of(high, hn::Load(df, bounds + d));
  }
  const SealRange range = reduce_range(low, high);
  HWY_ALIGN float lo[kEstimateTileTokens] = {range.lo};
  HWY_ALIGN float hi[kEstimateTileTokens] = {range.hi};
  HWY_ALIGN std::uint16_t scales[kEstimateTileTokens];
  HWY_ALIGN std::uint16_t zeros[kEstimateTileTokens];
  encode_parameters(15.0F, lo, hi, reinterpret_cast<std::byte*>(scales),
                    reinterpret_cast<std::byte*>(zeros));
  encode_codes(bounds, head_dim, 15.0F, f16_to_f32(scales[0]), f16_to_f32(zeros[0]), codes);
  const std::int64_t half = head_dim / 2;
  for (std::int64_t j = 0; j < half; ++j) {
    packed[j] = static_cast<std::byte>(codes[j] | codes[j + half] << 4);
  }
  std::memcpy(parameters, scales, 2);
  std::memcpy(parameters + 2, zeros, 2);
}

HWY_INLINE void encode_bounds(SummaryKind kind, std::int64_t head_dim, const SealScratch& s,
                              std::byte* record) {
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  const IndexVec zero = hn::Zero(df);
  for (std::int64_t d = 0; d < head_dim; d += kIndexLanes) {
    const IndexVec low = hn::Add(hn::Load(df, s.min + d), zero);
    const IndexVec high = hn::Add(hn::Load(df, s.max + d), zero);
    hn::Store(low, df, s.min + d);
    hn::Store(high, df, s.max + d);
    if (kind != SummaryKind::kQuestBf16) continue;
    // Outwards: a lower bound moves away from zero where it is negative, an upper one where not.
    const SealU32 below = hn::BitCast(du32, low);
    const SealU32 above = hn::BitCast(du32, high);
    const SealU32 low_half = hn::Set(du32, 0xffff);
    const SealU32 one = hn::Set(du32, 1);
    const auto away = [&](SealU32 bits, SealU32 sign) HWY_ATTR {
      const SealU32 inexact =
          hn::IfThenElse(hn::Eq(hn::And(bits, low_half), hn::Zero(du32)), hn::Zero(du32), one);
      return hn::Add(hn::ShiftRight<16>(bits), hn::And(inexact, sign));
    };
    store_halves(away(below, hn::ShiftRight<31>(below)), record + 2 * d);
    store_halves(away(above, hn::Xor(hn::ShiftRight<31>(above), one)), record + 2 * (head_dim + d));
  }
  if (kind != SummaryKind::kQuest4) return;
  std::byte* parameters = record + head_dim;
  encode_quest4_side(s.min, head_dim, s.codes, record, parameters);
  encode_quest4_side(s.max, head_dim, s.codes, record + head_dim / 2, parameters + 4);
  std::memset(parameters + 8, 0, 8);
}

// Quest bounds and estimates of 4 and 8 bits: what is made of the keys as they are.
inline void seal_plain(const PagedKvView& kv, const KeyIndexView& index, std::int64_t page,
                       std::int64_t kv_head, std::byte* scratch) {
  const std::int64_t head_dim = kv.head_dim;
  const int key_bits = index.format.key_bits == 2 ? 0 : index.format.key_bits;
  const SealScratch s = seal_scratch(head_dim, scratch);
  std::fill(s.min, s.min + head_dim, std::numeric_limits<float>::infinity());
  std::fill(s.max, s.max + head_dim, -std::numeric_limits<float>::infinity());
  const std::int64_t row_bytes = kv.k.token_stride * dtype_bytes(kv.dtype);
  const std::byte* rows = kv.k_rows(page, kv_head);
  std::byte* tile = key_bits == 0 ? nullptr : index.estimate(page, kv_head);
  for (int slot = 0; slot < kv.page_size; slot += kEstimateTileTokens) {
    const int count = std::min(kEstimateTileTokens, kv.page_size - slot);
    HWY_ALIGN float lo[kEstimateTileTokens] = {};
    HWY_ALIGN float hi[kEstimateTileTokens] = {};
    const std::byte* first = rows + slot * row_bytes;
    switch (kv.dtype) {
      case DType::kF32:
        read_tile<DType::kF32>(first, row_bytes, count, head_dim, s, lo, hi);
        break;
      case DType::kF16:
        read_tile<DType::kF16>(first, row_bytes, count, head_dim, s, lo, hi);
        break;
      case DType::kBf16:
        read_tile<DType::kBf16>(first, row_bytes, count, head_dim, s, lo, hi);
        break;
    }
    if (key_bits == 0) continue;
    if (key_bits == 4) {
      encode_tile<4>(s, head_dim, count, lo, hi, tile);
    } else {
      encode_tile<8>(s, head_dim, count, lo, hi, tile);
    }
    tile += estimate_tile_bytes(key_bits, kv.head_dim);
  }
  const SummaryKind summary = index.format.summary;
  if (summary == SummaryKind::kQuestBf16 || summary == SummaryKind::kQuest4) {
    encode_bounds(summary, head_dim, s, index.summary(page, kv_head));
  }
}

void seal_page(const PagedKvView& kv, const KeyIndexView& index, std::int64_t page,
               std::int64_t kv_head, std::byte* scratch) {
  const IndexFormat& format = index.format;
  const bool centroids = num_centroids(format.summary) > 0;
  if (format.has_params()) *index.page_params(page, kv_head) = {};
  if ((format.summary != SummaryKind::kNone && !centroids) || format.key_bits > 2) {
    seal_plain(kv, index, page, kv_head, scratch);
  }
  if (centroids || format.key_bits == 2) seal_rotated(kv, index, page, kv_head, scratch);
  if (format.value_bits != 0) seal_value_mean(kv, index, page, kv_head, scratch);
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_SEAL_INL_H_
