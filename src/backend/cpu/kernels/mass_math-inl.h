// Exponentials and logarithms of page masses.
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_MASS_MATH_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_MASS_MATH_INL_H_

#include "backend/cpu/kernels/index_math-inl.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// The larger of each lane, `best` where `e` is NaN.
HWY_INLINE IndexVec larger_known(IndexVec e, IndexVec best) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  return hn::Max(e, best);  // the second operand where one is NaN
#else
  return hn::IfThenElse(hn::Gt(e, best), e, best);
#endif
}

// exp(x) for x <= 0 within 2^-22 max(1, |x| / 4) of itself, so a sum with a 1 in it is within
// 2^-22; exp(-87), which no such sum notices, below that and for NaN. Degree 5 for 2^r: 9.1e-8.
HWY_INLINE IndexVec mass_exp(IndexVec x) {
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const IndexVec rounder = hn::Set(df, 0x1.8p23F);
  const IndexVec y = hn::Mul(larger_known(x, hn::Set(df, -87.0F)), hn::Set(df, 1.44269504F));
  const IndexVec shifted = hn::Add(y, rounder);
  const IndexVec r = hn::Sub(y, hn::Sub(shifted, rounder));
  IndexVec p = hn::Set(df, 0.0013264695880934596F);
  p = hn::MulAdd(p, r, hn::Set(df, 0.009671512991189957F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.05550733953714371F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.24022242426872253F));
  p = hn::MulAdd(p, r, hn::Set(df, 0.6931470036506653F));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0F));
  const auto power = hn::Add(hn::BitCast(di32, p), hn::ShiftLeft<23>(hn::BitCast(di32, shifted)));
  return hn::BitCast(df, power);
}

// log(x) for normal x >= 1, error below 2^-22 max(1, log x): x = 2^n m, m in [2^-1/2, 2^1/2),
// log m = 2 atanh((m - 1) / (m + 1)).
HWY_INLINE IndexVec mass_log(IndexVec x) {
  const IndexF df;
  const hn::RebindToSigned<IndexF> di32;
  const auto bits = hn::BitCast(di32, x);
  // 0x3f3504f3 is 2^-1/2.
  const auto n = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di32, 0x3f3504f3)));
  const IndexVec m = hn::BitCast(df, hn::Sub(bits, hn::ShiftLeft<23>(n)));
  const IndexVec one = hn::Set(df, 1.0F);
  const IndexVec s = hn::Div(hn::Sub(m, one), hn::Add(m, one));
  const IndexVec z = hn::Mul(s, s);
  IndexVec p = hn::Set(df, 2.0F / 9);
  p = hn::MulAdd(p, z, hn::Set(df, 2.0F / 7));
  p = hn::MulAdd(p, z, hn::Set(df, 2.0F / 5));
  p = hn::MulAdd(p, z, hn::Set(df, 2.0F / 3));
  p = hn::MulAdd(hn::Mul(p, z), s, hn::Add(s, s));
  const IndexVec exponent = hn::ConvertTo(df, n);
  p = hn::MulAdd(exponent, hn::Set(df, -2.12194440e-4F), p);
  return hn::MulAdd(exponent, hn::Set(df, 0.693359375F), p);
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_MASS_MATH_INL_H_
