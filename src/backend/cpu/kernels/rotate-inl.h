// The rotation of quant/rotation.h with its operations in its order, so the bits are the same.
// Units that include this are compiled without contraction (CMakeLists.txt).
#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ROTATE_INL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ROTATE_INL_H_

#include <array>

#include "backend/cpu/kernels/index_math-inl.h"
#include "quant/rotation.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

// The CPU backend takes no head dimension above this, and only multiples of 16, so every block of
// the rotation fills whole vectors.
constexpr int kMaxIndexDim = 512;

// Sign bits of rotation_sign, ready to be XORed.
HWY_ALIGN constexpr auto kRotationSigns = [] {
  std::array<std::uint32_t, kMaxIndexDim> signs{};
  for (int d = 0; d < kMaxIndexDim; ++d) signs[d] = rotation_sign(d) < 0 ? 0x80000000U : 0U;
  return signs;
}();

// Row `log2(step)`: sign bits of the lanes that hold the second operand of a butterfly.
HWY_ALIGN constexpr auto kSecondLanes = [] {
  std::array<std::array<std::uint32_t, kIndexLanes>, 4> signs{};
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < kIndexLanes; ++i) signs[step][i] = (i >> step & 1) != 0 ? 0x80000000U : 0U;
  }
  return signs;
}();

// (a, b) -> (a + b, a - b) on lanes kStep apart. Each lane adds its partner to itself, the second
// one with its own sign turned: a + (-b) has the bits of a - b.
template <int kStep>
HWY_INLINE IndexVec lane_butterfly(IndexVec v) {
  const IndexF df;
  IndexVec partner;
  if constexpr (kStep == 1) {
    partner = hn::Shuffle2301(v);
  } else if constexpr (kStep == 2) {
    partner = hn::Shuffle1032(v);
  } else if constexpr (kStep == 4) {
    partner = hn::SwapAdjacentBlocks(v);
  } else {
    partner = hn::ConcatLowerUpper(df, v, v);
  }
  constexpr int kRow = kStep == 1 ? 0 : kStep == 2 ? 1 : kStep == 4 ? 2 : 3;
  const IndexVec signs = hn::Load(df, reinterpret_cast<const float*>(kSecondLanes[kRow].data()));
  return hn::Add(partner, hn::Xor(v, signs));
}

HWY_INLINE IndexVec lane_butterflies(IndexVec v) {
  v = lane_butterfly<1>(v);
  v = lane_butterfly<2>(v);
  if constexpr (kIndexLanes >= 8) v = lane_butterfly<4>(v);
  if constexpr (kIndexLanes >= 16) v = lane_butterfly<8>(v);
  return v;
}

// log2(kCount) steps from distance `step` on over the vectors of a block, times `norm`.
template <int kCount>
HWY_INLINE void vector_butterflies(float* x, int size, int step, IndexVec norm) {
  const IndexF df;
  for (int i = 0; i < size; i += kCount * step) {
    for (int j = i; j < i + step; j += kIndexLanes) {
      IndexVec v[kCount];
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) v[k] = hn::Load(df, x + j + k * step);
#pragma GCC unroll 3
      for (int distance = 1; distance < kCount; distance *= 2) {
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) {
          if ((k & distance) != 0) continue;
          const IndexVec a = v[k];
          const IndexVec b = v[k + distance];
          v[k] = hn::Add(a, b);
          v[k + distance] = hn::Sub(a, b);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) hn::Store(hn::Mul(v[k], norm), df, x + j + k * step);
    }
  }
}

// R x of `row` [D], channel d loaded by load(d), into `out` [D], aligned.
template <typename LoadAt>
HWY_INLINE void rotate_into(int head_dim, const LoadAt& load, float* out) {
  const IndexF df;
  for (int begin = 0; begin < head_dim;) {
    const int block = rotation_block(head_dim, begin);
    const int count = block / kIndexLanes;
    const IndexVec norm =
        hn::Set(df, static_cast<float>(1.0 / std::sqrt(static_cast<double>(block))));
    const IndexVec one = hn::Set(df, 1.0F);
    for (int d = begin; d < begin + block; d += kIndexLanes) {
      const IndexVec signs =
          hn::Load(df, reinterpret_cast<const float*>(kRotationSigns.data()) + d);
      const IndexVec v = lane_butterflies(hn::Xor(load(d), signs));
      hn::Store(hn::Mul(v, count == 1 ? norm : one), df, out + d);
    }
    for (int step = kIndexLanes; step < block;) {
      const int left = block / step;
      float* x = out + begin;
      if (left >= 8) {
        vector_butterflies<8>(x, block, step, left == 8 ? norm : one);
        step *= 8;
      } else if (left == 4) {
        vector_butterflies<4>(x, block, step, norm);
        step *= 4;
      } else {
        vector_butterflies<2>(x, block, step, norm);
        step *= 2;
      }
    }
    begin += block;
  }
}

inline void rotate_query(const float* q, int head_dim, float* out) {
  rotate_into(
      head_dim, [&](int d) HWY_ATTR { return hn::LoadU(IndexF(), q + d); }, out);
}

}  // namespace
}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ROTATE_INL_H_
