#include "backend/cpu/kernels/prefill.h"
#include "backend/cpu/simd.h"
#include "core/float16.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using U32 = hn::RebindToUnsigned<F32>;
using U16Half = hn::Rebind<std::uint16_t, F32>;
using VecF = hn::Vec<F32>;

const std::uint16_t* u16_at(const std::byte* in, std::int64_t i) {
  return reinterpret_cast<const std::uint16_t*>(in + i * 2);
}
const float* f32_at(const std::byte* in, std::int64_t i) {
  return reinterpret_cast<const float*>(in + i * 4);
}

template <typename T>
T load_scalar(const std::byte* in, std::int64_t i) {
  T value;
  std::memcpy(&value, in + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float scalar_as_f32(const std::byte* in, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kBf16:
      return bf16_to_f32(load_scalar<std::uint16_t>(in, i));
    case DType::kF16:
      return f16_to_f32(load_scalar<std::uint16_t>(in, i));
    case DType::kF32:
      break;
  }
  return load_scalar<float>(in, i);
}

VecF load_bf16(const std::byte* in, std::int64_t i) {
  const U32 du;
  const auto half = hn::LoadU(U16Half(), u16_at(in, i));
  return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(du, half)));
}

VecF load_f16(const std::byte* in, std::int64_t i) {
#if HWY_TARGET == HWY_EMU128
  // The emulated promotion of this target does not know infinities.
  HWY_ALIGN float lanes[hn::MaxLanes(F32())];
  for (std::size_t l = 0; l < hn::Lanes(F32()); ++l) {
    lanes[l] = f16_to_f32(load_scalar<std::uint16_t>(in, i + static_cast<std::int64_t>(l)));
  }
  return hn::Load(F32(), lanes);
#else
  const hn::Rebind<hwy::float16_t, F32> dh;
  return hn::PromoteTo(F32(), hn::BitCast(dh, hn::LoadU(U16Half(), u16_at(in, i))));
#endif
}

void store_bf16(VecF value, std::uint16_t* out) {
  const U32 du;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(value));
  const auto result = hn::IfThenElse(is_nan, quiet, rounded);
  hn::StoreU(hn::TruncateTo(U16Half(), hn::ShiftRight<16>(result)), U16Half(), out);
}

template <typename Load>
void convert_to_bf16(const std::byte* in, DType dtype, std::int64_t count, std::uint16_t* out,
                     Load load) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_bf16(load(in, i), out + i);
  for (; i < count; ++i) out[i] = f32_to_bf16(scalar_as_f32(in, dtype, i));
}

template <typename Load>
void convert_to_f32(const std::byte* in, DType dtype, std::int64_t count, float* out, Load load) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(load(in, i), F32(), out + i);
  for (; i < count; ++i) out[i] = scalar_as_f32(in, dtype, i);
}

void to_bf16(const std::byte* in, DType dtype, std::int64_t count, std::uint16_t* out) {
  switch (dtype) {
    case DType::kBf16:
      std::memcpy(out, in, static_cast<std::size_t>(count) * 2);
      break;
    case DType::kF16:
      convert_to_bf16(in, dtype, count, out, load_f16);
      break;
    case DType::kF32:
      convert_to_bf16(in, dtype, count, out, [](const std::byte* from, std::int64_t i) {
        return hn::LoadU(F32(), f32_at(from, i));
      });
      break;
  }
}

void to_f32(const std::byte* in, DType dtype, std::int64_t count, float* out) {
  switch (dtype) {
    case DType::kBf16:
      convert_to_f32(in, dtype, count, out, load_bf16);
      break;
    case DType::kF16:
      convert_to_f32(in, dtype, count, out, load_f16);
      break;
    case DType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(count) * 4);
      break;
  }
}

// 2^x for x <= 0, NaN for NaN. Minimax polynomial of degree 6 on [-1/2, 1/2], relative
// error 1.6e-8, with the rounding of its evaluation below 2 ulp. Below -125 the result stays at
// 2^-125, so the exponent can be added as an integer.
HWY_INLINE VecF exp2_nonpositive(VecF x) {
  const F32 df;
  const U32 du;
  const VecF floor = hn::Set(df, -125.0F);
  x = hn::IfThenElse(hn::Lt(x, floor), floor, x);  // unlike Max, keeps NaN
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const VecF magic = hn::Set(df, 12582912.0F);
  const VecF shifted = hn::Add(x, magic);
  const VecF f = hn::Sub(x, hn::Sub(shifted, magic));
  VecF p = hn::Set(df, 0.000153458124F);
  p = hn::MulAdd(p, f, hn::Set(df, 0.00133999309F));
  p = hn::MulAdd(p, f, hn::Set(df, 0.00961848907F));
  p = hn::MulAdd(p, f, hn::Set(df, 0.0555032864F));
  p = hn::MulAdd(p, f, hn::Set(df, 0.240226462F));
  p = hn::MulAdd(p, f, hn::Set(df, 0.693147182F));
  p = hn::MulAdd(p, f, hn::Set(df, 1.0F));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(du, shifted));
  return hn::BitCast(df, hn::Add(hn::BitCast(du, p), exponent));
}

float row_max(const float* scores, std::int64_t visible) {
  const F32 df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const VecF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  VecF m0 = lowest;
  VecF m1 = lowest;
  std::int64_t i = 0;
  for (; i + 2 * lanes <= visible; i += 2 * lanes) {
    m0 = hn::Max(m0, hn::LoadU(df, scores + i));
    m1 = hn::Max(m1, hn::LoadU(df, scores + i + lanes));
  }
  for (; i < visible; i += lanes) {
    const auto seen = hn::FirstN(df, static_cast<std::size_t>(std::min(lanes, visible - i)));
    m0 = hn::Max(m0, hn::IfThenElse(seen, hn::LoadU(df, scores + i), lowest));
  }
  return hn::GetLane(hn::MaxOfLanes(df, hn::Max(m0, m1)));
}

// Stores the weights of one vector and returns them as stored. Weights are in [0, 1] (or NaN), so
// bf16 rounds half up with one add; NaN survives because its quiet bit is above the cut.
HWY_INLINE VecF store_weights(VecF w, std::uint16_t* out) {
  const U32 du;
  const auto rounded = hn::Add(hn::BitCast(du, w), hn::Set(du, 0x8000));
  hn::StoreU(hn::TruncateTo(U16Half(), hn::ShiftRight<16>(rounded)), U16Half(), out);
  return hn::BitCast(F32(), hn::And(rounded, hn::Set(du, 0xffff0000U)));
}
HWY_INLINE VecF store_weights(VecF w, float* out) {
  hn::StoreU(w, F32(), out);
  return w;
}

template <typename W>
void softmax_tile(const SoftmaxTile& tile) {
  const F32 df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const VecF scale = hn::Set(df, tile.scale_log2);
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const float* scores = tile.scores + r * tile.cols;
    W* weights = static_cast<W*>(tile.weights) + r * tile.cols;
    const std::int64_t visible =
        std::clamp<std::int64_t>(tile.first_visible + r / tile.group, 0, tile.cols);
    if (visible == 0) {
      std::fill_n(weights, tile.cols, W{0});
      continue;
    }
    const float tile_max = row_max(scores, visible) * tile.scale_log2;
    const float old_max = tile.max[r];
    if (!(tile_max <= old_max)) {
      const float factor = hn::GetLane(exp2_nonpositive(hn::Set(df, old_max - tile_max)));
      tile.max[r] = tile_max;
      tile.sum[r] *= factor;
      float* out = tile.out + r * tile.head_dim;
      const VecF factors = hn::Set(df, factor);
      for (std::int64_t d = 0; d < tile.head_dim; d += lanes) {
        hn::StoreU(hn::Mul(hn::LoadU(df, out + d), factors), df, out + d);
      }
    }
    const VecF max = hn::Set(df, tile.max[r]);
    VecF sum0 = hn::Zero(df);
    VecF sum1 = hn::Zero(df);
    std::int64_t i = 0;
    for (; i + 2 * lanes <= visible; i += 2 * lanes) {
      const VecF w0 = exp2_nonpositive(hn::MulSub(hn::LoadU(df, scores + i), scale, max));
      const VecF w1 = exp2_nonpositive(hn::MulSub(hn::LoadU(df, scores + i + lanes), scale, max));
      sum0 = hn::Add(sum0, store_weights(w0, weights + i));
      sum1 = hn::Add(sum1, store_weights(w1, weights + i + lanes));
    }
    for (; i < visible; i += lanes) {
      const auto seen = hn::FirstN(df, static_cast<std::size_t>(std::min(lanes, visible - i)));
      const VecF w = exp2_nonpositive(hn::MulSub(hn::LoadU(df, scores + i), scale, max));
      sum0 = hn::Add(sum0, store_weights(hn::IfThenElseZero(seen, w), weights + i));
    }
    if (i < tile.cols) std::fill_n(weights + i, tile.cols - i, W{0});
    tile.sum[r] += hn::GetLane(hn::SumOfLanes(df, hn::Add(sum0, sum1)));
  }
}

}  // namespace

const PrefillKernels& prefill_kernels() {
  static constexpr PrefillKernels kTable = {to_bf16, to_f32, softmax_tile<std::uint16_t>,
                                            softmax_tile<float>};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
