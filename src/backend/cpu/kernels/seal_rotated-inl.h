// Records of the rotated planes and of value means, the bytes of quant/page_codec.cc. Sums follow
// the order of quant/lane_sum.h, and no product is contracted with a sum (CMakeLists.txt).
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_SEAL_ROTATED_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_SEAL_ROTATED_INL_H_

#include "backend/cpu/kernels/rotate-inl.h"
#include "quant/f16_fields.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// Rows kept at once; runs of tokens longer than this are read and rotated twice.
constexpr int kRowsHeld = kEstimateTileTokens;
// Memory of a page's rotated records, carved from the caller's scratch after seal_scratch's. The
// rows share the place of the plain keys.
struct RotatedScratch {
  float* rows;          // [kRowsHeld, D]
  float* centre;        // [D]
  float* deviant;       // [D]
  std::uint8_t* codes;  // [D]
};

inline RotatedScratch rotated_scratch(std::int64_t head_dim, std::byte* scratch) {
  auto* rows = reinterpret_cast<float*>(scratch);
  float* centre = rows + kRowsHeld * head_dim;
  float* deviant = centre + head_dim;
  return {rows, centre, deviant, reinterpret_cast<std::uint8_t*>(deviant + head_dim)};
}

// The 16 lanes of lane_sum.
constexpr int kSumParts = 16 / kIndexLanes;
struct LaneSum {
  IndexVec part[kSumParts];

  HWY_INLINE void clear() {
#pragma GCC unroll 4
    for (int i = 0; i < kSumParts; ++i) part[i] = hn::Zero(IndexF());
  }
  HWY_INLINE float fold() const {
    HWY_ALIGN float lanes[16];
#pragma GCC unroll 4
    for (int i = 0; i < kSumParts; ++i) hn::Store(part[i], IndexF(), lanes + i * kIndexLanes);
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }
};

template <DType kType>
HWY_INLINE void rotate_row(const std::byte* row, int head_dim, float* out) {
  rotate_into(
      head_dim, [&](int d) HWY_ATTR { return load_row<kType>(row, d); }, out);
}
inline void rotate_row(DType dtype, const std::byte* row, int head_dim, float* out) {
  switch (dtype) {
    case DType::kF32:
      return rotate_row<DType::kF32>(row, head_dim, out);
    case DType::kF16:
      return rotate_row<DType::kF16>(row, head_dim, out);
    case DType::kBf16:
      return rotate_row<DType::kBf16>(row, head_dim, out);
  }
}

// encode_nibbles of quant/nibbles.cc. `bytes` is scratch of D.
HWY_INLINE std::uint16_t encode_nibble_vector(const float* x, int head_dim, std::uint8_t* bytes,
                                              std::byte* codes) {
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Rebind<std::uint8_t, IndexF> du8;
  IndexVec largest = hn::Zero(df);
  for (int d = 0; d < head_dim; d += kIndexLanes) {
    const IndexVec v = hn::Abs(hn::Load(df, x + d));
    largest = hn::IfThenElse(hn::Gt(v, largest), v, largest);
  }
  const std::uint16_t bits = f16_clamped(hn::GetLane(hn::MaxOfLanes(df, largest)) / 7.5F);
  const float scale = f16_to_f32(bits);
  if (!(scale > 0)) {
    std::memset(codes, 0x77, static_cast<std::size_t>(head_dim / 2));
    return bits;
  }
  // Clamping comes before rounding, which gives the same codes as after; the addition of 2^23
  // rounds to nearest even and leaves the code in the low byte.
  const IndexVec vscale = hn::Set(df, scale);
  const IndexVec centre = hn::Set(df, 7.5F);
  const IndexVec top = hn::Set(df, 15.0F);
  const IndexVec magic = hn::Set(df, 8388608.0F);
  for (int d = 0; d < head_dim; d += kIndexLanes) {
    const IndexVec steps = hn::Add(hn::Div(hn::Load(df, x + d), vscale), centre);
    const IndexVec positive = hn::IfThenElseZero(hn::Gt(steps, hn::Zero(df)), steps);
    const IndexVec code = hn::Add(hn::IfThenElse(hn::Lt(top, positive), top, positive), magic);
    hn::StoreU(hn::TruncateTo(du8, hn::BitCast(du32, code)), du8, bytes + d);
  }
  for (int d = 0; d < head_dim; d += 8) {
    std::uint64_t pair;
    std::memcpy(&pair, bytes + d, sizeof(pair));
    const auto word = static_cast<std::uint32_t>(pair) | static_cast<std::uint32_t>(pair >> 28);
    std::memcpy(codes + d / 2, &word, sizeof(word));
  }
  return bits;
}

// decode_nibbles.
HWY_INLINE void decode_nibble_vector(const std::byte* codes, std::uint16_t scale, int head_dim,
                                     float* x) {
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const hn::Rebind<std::uint8_t, IndexF> du8;
  const IndexVec step = hn::Set(df, f16_to_f32(scale));
  const IndexVec centre = hn::Set(df, 7.5F);
  HWY_ALIGN std::uint8_t bytes[kMaxIndexDim];
  for (int d = 0; d < head_dim; d += 8) {
    std::uint32_t word;
    std::memcpy(&word, codes + d / 2, sizeof(word));
    const std::uint64_t pair = (word & 0x0f0f0f0fU) | static_cast<std::uint64_t>(word & 0xf0f0f0f0U)
                                                          << 28;
    std::memcpy(bytes + d, &pair, sizeof(pair));
  }
  for (int d = 0; d < head_dim; d += kIndexLanes) {
    const IndexVec code = hn::ConvertTo(df, hn::PromoteTo(di32, hn::Load(du8, bytes + d)));
    hn::Store(hn::Mul(step, hn::Sub(code, centre)), df, x + d);
  }
}

// Writes token t's 2-bit codes and scale into its tile, from its residual and their squares' sum.
HWY_INLINE void encode_residual_row(const float* r, int head_dim, float energy, int t,
                                    std::uint8_t* codes, std::byte* tile) {
  const IndexF df;
  const hn::RebindToUnsigned<IndexF> du32;
  const hn::Rebind<std::uint8_t, IndexF> du8;
  const float rms = std::sqrt(energy / static_cast<float>(head_dim));
  const IndexVec limit = hn::Set(df, rms);
  LaneSum matched;
  matched.clear();
  std::size_t far = 0;
  for (int d = 0; d < head_dim; d += 16) {
#pragma GCC unroll 4
    for (int i = 0; i < kSumParts; ++i) {
      const IndexVec v = hn::Load(df, r + d + i * kIndexLanes);
      const IndexVec size = hn::Abs(v);
      const auto outer = hn::Gt(size, limit);
      far += hn::CountTrue(df, outer);
      const IndexVec level = hn::IfThenElse(outer, hn::Set(df, 1.5F), hn::Set(df, 0.5F));
      matched.part[i] = hn::Add(matched.part[i], hn::Mul(size, level));
      // Codes 0 to 3 from below: 2 and 3 where r >= 0, the outer ones where |r| > rms.
      const auto upper = hn::Ge(v, hn::Zero(df));
      const auto bit = [&](std::uint32_t x) HWY_ATTR { return hn::Set(du32, x); };
      const auto outer32 = hn::RebindMask(du32, outer);
      const auto code =
          hn::IfThenElse(hn::RebindMask(du32, upper), hn::IfThenElse(outer32, bit(3), bit(2)),
                         hn::IfThenElse(outer32, bit(0), bit(1)));
      hn::StoreU(hn::TruncateTo(du8, code), du8, codes + d + i * kIndexLanes);
    }
  }
  // Multiples of a quarter below 2^24: exact in any order.
  const float levels = 0.25F * static_cast<float>(head_dim) + 2.0F * static_cast<float>(far);
  // Blocks of 128 bits hold 16 channels of the token: four words s of channels 4 s to 4 s + 3.
  const hn::RebindToUnsigned<IndexF> dw;
  HWY_ALIGN static constexpr std::uint32_t kShifts[16] = {0, 2, 4, 6, 0, 2, 4, 6,
                                                          0, 2, 4, 6, 0, 2, 4, 6};
  const auto shifts = hn::Load(dw, kShifts);
  const auto* words = reinterpret_cast<const std::uint32_t*>(codes);
  std::byte* column = tile + 4 * t;
  for (int w = 0; w < head_dim / 4; w += kIndexLanes) {
    auto v = hn::Shl(hn::Load(dw, words + w), shifts);
    v = hn::Or(v, hn::Shuffle2301(v));
    v = hn::Or(v, hn::Shuffle1032(v));
    HWY_ALIGN std::uint32_t out[kIndexLanes];
    hn::Store(v, dw, out);
    const int groups = std::min(kIndexLanes, head_dim / 4 - w) / 4;
    for (int g = 0; g < groups; ++g, column += 64) std::memcpy(column, out + 4 * g, 4);
  }
  store_f16(tile + estimate_code_bytes(2, head_dim) + 2 * t, f16_clamped(matched.fold() / levels));
}

HWY_INLINE void add_row(const float* row, int head_dim, float* sum) {
  const IndexF df;
  for (int d = 0; d < head_dim; d += kIndexLanes) {
    hn::Store(hn::Add(hn::Load(df, sum + d), hn::Load(df, row + d)), df, sum + d);
  }
}

HWY_INLINE void divide_row(float* x, int head_dim, float by) {
  const IndexF df;
  const IndexVec divisor = hn::Set(df, by);
  for (int d = 0; d < head_dim; d += kIndexLanes) {
    hn::Store(hn::Div(hn::Load(df, x + d), divisor), df, x + d);
  }
}

// row -= centre; the lane_sum of its squares.
HWY_INLINE float centre_row(float* row, const float* centre, int head_dim) {
  const IndexF df;
  LaneSum energy;
  energy.clear();
  for (int d = 0; d < head_dim; d += 16) {
#pragma GCC unroll 4
    for (int i = 0; i < kSumParts; ++i) {
      const int at = d + i * kIndexLanes;
      const IndexVec r = hn::Sub(hn::Load(df, row + at), hn::Load(df, centre + at));
      hn::Store(r, df, row + at);
      energy.part[i] = hn::Add(energy.part[i], hn::Mul(r, r));
    }
  }
  return energy.fold();
}

// Centroids, deviant residual, variance and 2-bit estimates of one page.
inline void seal_rotated(const PagedKvView& kv, const KeyIndexView& index, std::int64_t page,
                         std::int64_t kv_head, std::byte* scratch) {
  const int head_dim = kv.head_dim;
  const int page_size = kv.page_size;
  const IndexFormat& format = index.format;
  const RotatedScratch s = rotated_scratch(head_dim, scratch);
  PageParams* params = index.page_params(page, kv_head);
  std::byte* centres = index.centres(page, kv_head, page_size, head_dim);
  std::byte* estimate = format.key_bits == 2 ? index.estimate(page, kv_head) : nullptr;
  const std::int64_t tile_bytes = estimate_tile_bytes(2, head_dim);
  if (estimate != nullptr && page_size % kEstimateTileTokens != 0) {
    std::memset(estimate + (estimate_tiles_per_page(page_size) - 1) * tile_bytes, 0,
                static_cast<std::size_t>(tile_bytes));
  }
  const SummaryKind centring = format.own_centre() ? SummaryKind::kCentroid : format.summary;
  const bool keeps_deviant = format.summary == SummaryKind::kCentroid;
  const int run_tokens = centroid_tokens(centring, page_size);
  const std::byte* rows = kv.k_rows(page, kv_head);
  const std::int64_t row_bytes = kv.k.token_stride * dtype_bytes(kv.dtype);
  const auto rotate_rows = [&](int begin, int end) {
    for (int slot = begin; slot < end; ++slot) {
      rotate_row(kv.dtype, rows + slot * row_bytes, head_dim, s.rows + (slot - begin) * head_dim);
    }
  };

  float total = 0;
  float farthest = -1;
  for (int i = 0; i < num_centroids(centring); ++i) {
    const int begin = std::min(i * run_tokens, page_size);
    const int end = std::min(begin + run_tokens, page_size);
    std::fill_n(s.centre, head_dim, 0.0F);
    for (int slot = begin; slot < end; slot += kRowsHeld) {
      const int stop = std::min(slot + kRowsHeld, end);
      rotate_rows(slot, stop);
      for (int j = slot; j < stop; ++j) add_row(s.rows + (j - slot) * head_dim, head_dim, s.centre);
    }
    if (end > begin) divide_row(s.centre, head_dim, static_cast<float>(end - begin));
    std::byte* codes = centres + i * nibble_bytes(head_dim);
    params->centre_scale[i] = encode_nibble_vector(s.centre, head_dim, s.codes, codes);
    decode_nibble_vector(codes, params->centre_scale[i], head_dim, s.centre);
    for (int first = begin; first < end; first += kRowsHeld) {
      const int stop = std::min(first + kRowsHeld, end);
      if (end - begin > kRowsHeld) rotate_rows(first, stop);
      for (int slot = first; slot < stop; ++slot) {
        float* row = s.rows + (slot - first) * head_dim;
        const float energy = centre_row(row, s.centre, head_dim);
        total += energy;
        if (energy > farthest || slot == 0) {
          if (keeps_deviant) std::copy_n(row, head_dim, s.deviant);
          if (energy > farthest) farthest = energy;
        }
        if (estimate != nullptr) {
          encode_residual_row(row, head_dim, energy, slot % kEstimateTileTokens, s.codes,
                              estimate + slot / kEstimateTileTokens * tile_bytes);
        }
      }
    }
  }
  params->variance = f16_clamped(total / static_cast<float>(page_size * head_dim));
  if (keeps_deviant) {
    params->centre_scale[1] = encode_nibble_vector(
        s.deviant, head_dim, s.codes, index.summary(page, kv_head) + nibble_bytes(head_dim));
  }
}

template <DType kType>
HWY_INLINE void seal_value_mean(const PagedKvView& kv, const KeyIndexView& index, std::int64_t page,
                                std::int64_t kv_head, std::byte* scratch) {
  const IndexF df;
  const int head_dim = kv.head_dim;
  const RotatedScratch s = rotated_scratch(head_dim, scratch);
  const std::byte* rows = kv.v_rows(page, kv_head);
  const std::int64_t row_bytes = kv.v.token_stride * dtype_bytes(kv.dtype);
  const IndexVec count = hn::Set(df, static_cast<float>(kv.page_size));
  for (int d = 0; d < head_dim; d += kIndexLanes) {
    IndexVec sum = hn::Zero(df);
    for (int slot = 0; slot < kv.page_size; ++slot) {
      sum = hn::Add(sum, load_row<kType>(rows + slot * row_bytes, d));
    }
    hn::Store(hn::Div(sum, count), df, s.centre + d);
  }
  PageParams* params = index.page_params(page, kv_head);
  std::byte* codes = index.value_mean(page, kv_head);
  params->value_scale = encode_nibble_vector(s.centre, head_dim, s.codes, codes);
}

inline void seal_value_mean(const PagedKvView& kv, const KeyIndexView& index, std::int64_t page,
                            std::int64_t kv_head, std::byte* scratch) {
  switch (kv.dtype) {
    case DType::kF32:
      return seal_value_mean<DType::kF32>(kv, index, page, kv_head, scratch);
    case DType::kF16:
      return seal_value_mean<DType::kF16>(kv, index, page, kv_head, scratch);
    case DType::kBf16:
      return seal_value_mean<DType::kBf16>(kv, index, page, kv_head, scratch);
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_SEAL_ROTATED_INL_H_
