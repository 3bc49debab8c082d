// Vector helpers of the attention kernels: sums of many accumulators at once, 2^x, row loads.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_MATH_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_MATH_INL_H_

#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(sizeof(VF) / sizeof(float));
constexpr int kBlocksPerVec = kLanes / 4;  // 128-bit blocks

inline VF interleave_pairs_lower(VF a, VF b) {
  const hn::RepartitionToWide<hn::RebindToUnsigned<DF>> du64;
  return hn::BitCast(DF(), hn::InterleaveLower(du64, hn::BitCast(du64, a), hn::BitCast(du64, b)));
}
inline VF interleave_pairs_upper(VF a, VF b) {
  const hn::RepartitionToWide<hn::RebindToUnsigned<DF>> du64;
  return hn::BitCast(DF(), hn::InterleaveUpper(du64, hn::BitCast(du64, a), hn::BitCast(du64, b)));
}

// Lane i of each 128-bit block of the result: sum of that block of a[i].
HWY_INLINE VF sum_quad(const VF* a) {
  const DF df;
  const VF s01 = hn::Add(hn::InterleaveLower(df, a[0], a[1]), hn::InterleaveUpper(df, a[0], a[1]));
  const VF s23 = hn::Add(hn::InterleaveLower(df, a[2], a[3]), hn::InterleaveUpper(df, a[2], a[3]));
  return hn::Add(interleave_pairs_lower(s01, s23), interleave_pairs_upper(s01, s23));
}

// Lane i of the result: the sum of all lanes of a[i]. About three instructions per accumulator,
// against log2(kLanes) * 2 for one at a time.
template <int kBlocks = kBlocksPerVec>
HWY_INLINE VF sum_each(const VF* a) {
  if constexpr (kBlocks == 1) {
    return sum_quad(a);
  } else if constexpr (kBlocks == 2) {
    const DF df;
    const VF q0 = sum_quad(a);
    const VF q1 = sum_quad(a + 4);
    return hn::Add(hn::ConcatLowerLower(df, q1, q0), hn::ConcatUpperUpper(df, q1, q0));
  } else {
    static_assert(kBlocks == 4);
    const DF df;
    const VF q0 = sum_quad(a);
    const VF q2 = sum_quad(a + 8);
    const VF x = hn::Add(hn::ConcatLowerLower(df, q2, q0), hn::ConcatUpperUpper(df, q2, q0));
    const VF q1 = sum_quad(a + 4);
    const VF q3 = sum_quad(a + 12);
    const VF y = hn::Add(hn::ConcatLowerLower(df, q3, q1), hn::ConcatUpperUpper(df, q3, q1));
    // x holds blocks (0, 0', 2, 2'), y (1, 1', 3, 3'), halves of the sums still to be added.
    return hn::Add(hn::OddEvenBlocks(y, x), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(x, y)));
  }
}

// Maximum over the lanes that belong to the same head, in all of them. Block b of a vector belongs
// to head b % H (to one head where H >= kBlocksPerVec).
template <int H>
HWY_INLINE VF max_within_head(VF v) {
  v = hn::Max(v, hn::Shuffle2301(v));
  v = hn::Max(v, hn::Shuffle1032(v));
  if constexpr (kBlocksPerVec == 4 && H <= 2) {
    v = hn::Max(v, hn::ConcatLowerUpper(DF(), v, v));
  }
  if constexpr (kBlocksPerVec >= 2 && H == 1) v = hn::Max(v, hn::SwapAdjacentBlocks(v));
  return v;
}

// 2^x for x <= 0, relative error below 2^-23: x = n + f, f in [-1/2, 1/2], and a degree-6
// polynomial for 2^f (its own error is 5e-09). Results below 2^-126 are 0; NaN stays NaN.
HWY_INLINE VF exp2_nonpositive(VF x) {
  const DF df;
  const hn::RebindToSigned<DF> di;
  const VF lowest = hn::Set(df, -126.0F);
  const VF n = hn::Round(hn::IfThenElse(hn::Ge(x, lowest), x, lowest));
  const VF f = hn::Sub(x, n);
  VF p = hn::Set(df, 1.54531629e-04F);
  p = hn::MulAdd(p, f, hn::Set(df, 1.33908634e-03F));
  p = hn::MulAdd(p, f, hn::Set(df, 9.61808256e-03F));
  p = hn::MulAdd(p, f, hn::Set(df, 5.55035711e-02F));
  p = hn::MulAdd(p, f, hn::Set(df, 2.40226508e-01F));
  p = hn::MulAdd(p, f, hn::Set(df, 6.93147188e-01F));
  p = hn::MulAdd(p, f, hn::Set(df, 1.0F));
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, n));
  const VF scaled = hn::BitCast(df, hn::Add(hn::BitCast(di, p), exponent));
  // Written so that a NaN, for which every comparison is false, is not replaced.
  return hn::IfThenZeroElse(hn::Lt(x, lowest), hn::IfThenElse(hn::Eq(x, x), scaled, x));
}

// Elements of a row as the cache stores them; Lanes(df) of them become floats exactly.
struct ElemF32 {
  static constexpr int kBytes = 4;
  static HWY_INLINE VF load(const std::byte* row, std::int64_t d) {
    return hn::LoadU(DF(), reinterpret_cast<const float*>(row) + d);
  }
};
struct ElemF16 {
  static constexpr int kBytes = 2;
  static HWY_INLINE VF load(const std::byte* row, std::int64_t d) {
#if HWY_TARGET == HWY_EMU128
    // The emulated conversion takes NaN and infinity for large numbers.
    const DF df;
    const hn::RebindToUnsigned<DF> du;
    const hn::Rebind<std::uint16_t, DF> dh;
    const auto* from = reinterpret_cast<const std::uint16_t*>(row) + d;
    const auto bits = hn::PromoteTo(du, hn::LoadU(dh, from));
    const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000U)));
    const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7fffU)));
    // 2^112 moves the exponent, of subnormals too; all ones stay all ones.
    const VF scaled = hn::Mul(hn::BitCast(df, magnitude), hn::Set(df, 0x1p112F));
    const auto special =
        hn::IfThenElseZero(hn::Ge(magnitude, hn::Set(du, 0x0f800000U)), hn::Set(du, 0x7f800000U));
    return hn::BitCast(df, hn::Or(hn::Or(hn::BitCast(du, scaled), special), sign));
#else
    const hn::Rebind<hwy::float16_t, DF> dh;
    return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(row) + d));
#endif
  }
};
struct ElemBf16 {
  static constexpr int kBytes = 2;
  static HWY_INLINE VF load(const std::byte* row, std::int64_t d) {
    const hn::RebindToUnsigned<DF> du;
    const hn::Rebind<std::uint16_t, DF> dh;
    const auto bits = hn::LoadU(dh, reinterpret_cast<const std::uint16_t*>(row) + d);
    return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
  }
};

// Asks for the cache lines of [bytes_begin, bytes_end) of each row.
template <int kRows>
HWY_INLINE void prefetch_rows(const std::byte* const* rows, std::int64_t bytes_begin,
                              std::int64_t bytes_end) {
  for (int t = 0; t < kRows; ++t) {
    for (std::int64_t at = bytes_begin; at < bytes_end; at += 64) {
      __builtin_prefetch(rows[t] + at, 0, 2);
    }
  }
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_MATH_INL_H_
