// What: matrix-vector products of decode, RMSNorm, rotary embedding, SiLU gate.
// Mapping: one call per range of output rows, rows, tokens or elements.
// Bound: the product by reading the weights once from memory (2 FMA per bf16 weight and row); the
// rest is small. Numerics: weights widen exactly to f32, products and sums in f32 over 4 *
// lanes partial sums. Test: tests/parity/model_parity_test.cc
#include <hwy/contrib/math/math-inl.h>

#include "backend/cpu/kernels/model.h"
#include "backend/cpu/simd.h"
#include "core/float16.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr std::int64_t kLanes = static_cast<std::int64_t>(sizeof(VF) / sizeof(float));

// One vector of weights at `at`, which may be unaligned.
template <DType kDtype>
HWY_INLINE VF load_weights(const std::byte* at) {
  const DF df;
  if constexpr (kDtype == DType::kF32) {
    return hn::LoadU(df, reinterpret_cast<const float*>(at));
  } else if constexpr (kDtype == DType::kBf16) {
    const hn::Rebind<std::uint16_t, DF> du16;
    const hn::RebindToUnsigned<DF> du32;
    const auto bits = hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(at));
    return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
  } else {
    const hn::Rebind<std::uint16_t, DF> du16;
    const hn::Rebind<hwy::float16_t, DF> df16;
    const auto bits = hn::LoadU(du16, reinterpret_cast<const std::uint16_t*>(at));
    return hn::PromoteTo(df, hn::BitCast(df16, bits));
  }
}

template <DType kDtype>
inline float load_weight(const std::byte* at) {
  if constexpr (kDtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  } else {
    std::uint16_t bits;
    std::memcpy(&bits, at, sizeof(bits));
    return kDtype == DType::kBf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  }
}

// One weight row against kInputs inputs. A row is read front to back, so the weights are one stream
// of memory: four rows side by side ran at half the bandwidth. An input's sum does not depend on
// kInputs.
template <DType kDtype, int kInputs>
HWY_INLINE void dot_row(const LinearParams& p, std::int64_t row, std::int32_t input) {
  constexpr int kUnroll = 4;
  constexpr std::int64_t kBytes = dtype_bytes(kDtype);
  const DF df;
  const std::int64_t cols = p.weight.cols;
  const std::byte* weights = p.weight.data + row * cols * kBytes;
  const float* x = p.x + input * p.x_stride;
  VF sums[kInputs][kUnroll];
  for (int m = 0; m < kInputs; ++m) {
    for (int u = 0; u < kUnroll; ++u) sums[m][u] = hn::Zero(df);
  }
  std::int64_t col = 0;
  for (; col + kUnroll * kLanes <= cols; col += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t at = col + u * kLanes;
      const VF w = load_weights<kDtype>(weights + at * kBytes);
      for (int m = 0; m < kInputs; ++m) {
        sums[m][u] = hn::MulAdd(w, hn::LoadU(df, x + m * p.x_stride + at), sums[m][u]);
      }
    }
  }
  for (; col + kLanes <= cols; col += kLanes) {
    const VF w = load_weights<kDtype>(weights + col * kBytes);
    for (int m = 0; m < kInputs; ++m) {
      sums[m][0] = hn::MulAdd(w, hn::LoadU(df, x + m * p.x_stride + col), sums[m][0]);
    }
  }
  for (int m = 0; m < kInputs; ++m) {
    const VF all = hn::Add(hn::Add(sums[m][0], sums[m][1]), hn::Add(sums[m][2], sums[m][3]));
    float sum = hn::GetLane(hn::SumOfLanes(df, all));
    for (std::int64_t c = col; c < cols; ++c) {
      sum += load_weight<kDtype>(weights + c * kBytes) * x[m * p.x_stride + c];
    }
    if (p.bias != nullptr) sum += p.bias[row];
    float& y = p.y[(input + m) * p.y_stride + row];
    y = p.accumulate ? y + sum : sum;
  }
}

template <DType kDtype>
void matvec_of(const LinearParams& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::int32_t input = 0;
    for (; input + 2 <= p.num_rows; input += 2) dot_row<kDtype, 2>(p, row, input);
    if (input < p.num_rows) dot_row<kDtype, 1>(p, row, input);
  }
}

void matvec(const LinearParams& p, std::int64_t begin, std::int64_t end) {
  switch (p.weight.dtype) {
    case DType::kF32:
      return matvec_of<DType::kF32>(p, begin, end);
    case DType::kF16:
      return matvec_of<DType::kF16>(p, begin, end);
    case DType::kBf16:
      return matvec_of<DType::kBf16>(p, begin, end);
  }
}

void rms_norm(const RmsNormParams& p, std::int64_t begin, std::int64_t end) {
  const DF df;
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = p.x + row * p.hidden;
    float* y = p.y + row * p.hidden;
    VF squares = hn::Zero(df);
    std::int64_t i = 0;
    for (; i + kLanes <= p.hidden; i += kLanes) {
      const VF v = hn::LoadU(df, x + i);
      squares = hn::MulAdd(v, v, squares);
    }
    double total = static_cast<double>(hn::GetLane(hn::SumOfLanes(df, squares)));
    for (std::int64_t j = i; j < p.hidden; ++j) {
      total += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    }
    const float inverse = static_cast<float>(
        1.0 / std::sqrt(total / static_cast<double>(p.hidden) + static_cast<double>(p.eps)));
    const VF factor = hn::Set(df, inverse);
    for (i = 0; i + kLanes <= p.hidden; i += kLanes) {
      const VF scaled = hn::Mul(hn::LoadU(df, x + i), factor);
      hn::StoreU(hn::Mul(scaled, hn::LoadU(df, p.weight + i)), df, y + i);
    }
    for (; i < p.hidden; ++i) y[i] = x[i] * inverse * p.weight[i];
  }
}

void rope(const RopeParams& p, std::int64_t begin, std::int64_t end) {
  const DF df;
  const std::int64_t half = p.head_dim / 2;
  for (std::int64_t token = begin; token < end; ++token) {
    const float* cos = p.cos + token * half;
    const float* sin = p.sin + token * half;
    for (std::int32_t head = 0; head < p.num_heads; ++head) {
      float* a = p.x + token * p.token_stride + std::int64_t{head} * p.head_dim;
      float* b = a + half;
      std::int64_t i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        const VF va = hn::LoadU(df, a + i);
        const VF vb = hn::LoadU(df, b + i);
        const VF c = hn::LoadU(df, cos + i);
        const VF s = hn::LoadU(df, sin + i);
        hn::StoreU(hn::NegMulAdd(vb, s, hn::Mul(va, c)), df, a + i);
        hn::StoreU(hn::MulAdd(va, s, hn::Mul(vb, c)), df, b + i);
      }
      for (; i < half; ++i) {
        const float va = a[i];
        const float vb = b[i];
        a[i] = va * cos[i] - vb * sin[i];
        b[i] = vb * cos[i] + va * sin[i];
      }
    }
  }
}

HWY_INLINE VF silu(VF x) {
  const DF df;
  // Exp is right up to 104 only. From 89 on it is infinity, which stays right here: x / inf = -0.
  const VF e = hn::Exp(df, hn::Min(hn::Neg(x), hn::Set(df, 100.0F)));
  return hn::Div(x, hn::Add(hn::Set(df, 1.0F), e));
}

void silu_mul(const SiluMulParams& p, std::int64_t begin, std::int64_t end) {
  const DF df;
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const VF gate = silu(hn::LoadU(df, p.gate + i));
    hn::StoreU(hn::Mul(gate, hn::LoadU(df, p.up + i)), df, p.y + i);
  }
  if (i < end) {
    // The same vector code on a padded copy, so an element's value does not depend on where the
    // range ends.
    float gate[kLanes] = {};
    float up[kLanes] = {};
    for (std::int64_t j = i; j < end; ++j) {
      gate[j - i] = p.gate[j];
      up[j - i] = p.up[j];
    }
    hn::StoreU(hn::Mul(silu(hn::LoadU(df, gate)), hn::LoadU(df, up)), df, gate);
    for (std::int64_t j = i; j < end; ++j) p.y[j] = gate[j - i];
  }
}

}  // namespace

const ModelKernels& model_kernels() {
  static constexpr ModelKernels kTable = {matvec, rms_norm, rope, silu_mul};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
