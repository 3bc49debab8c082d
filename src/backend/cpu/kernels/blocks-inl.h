// What: matrix-vector products with weights in quantised blocks, and their weights in f32.
// Mapping: one call per range of output rows.
// Bound: reading the blocks once from memory; in the narrow types about level with the arithmetic.
// Numerics: activations round to bytes, 32 at a time; integer sums are exact, steps and offsets
// meet them in f32 (docs/numerics.md). Compiled with -ffp-contract=off: only what is written as a
// fused product is one. Test: tests/parity/blocks_parity_test.cc
#include "backend/cpu/kernels/blocks.h"
#include "backend/cpu/simd.h"

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
#include "backend/cpu/kernels/block_dot-inl.h"
#else
#include "backend/cpu/kernels/block_loops-inl.h"
#endif

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

#define TWILIGHT_FOR_EACH_BLOCK_TYPE(X) \
  X(kQ4_0) X(kQ4_1) X(kQ5_0) X(kQ5_1) X(kQ8_0) X(kQ2_K) X(kQ3_K) X(kQ4_K) X(kQ5_K) X(kQ6_K)

void matvec(const LinearParams& params, const std::byte* inputs, std::int64_t begin,
            std::int64_t end) {
  switch (params.weight.blocks) {
#define TWILIGHT_BLOCK_CASE(type) \
  case WeightType::type:          \
    return matvec_of<WeightType::type>(params, inputs, begin, end);
    TWILIGHT_FOR_EACH_BLOCK_TYPE(TWILIGHT_BLOCK_CASE)
#undef TWILIGHT_BLOCK_CASE
    default:
      return;
  }
}

void dequantise(WeightType type, const std::byte* blocks, std::int64_t count, float* out) {
  switch (type) {
#define TWILIGHT_BLOCK_CASE(type) \
  case WeightType::type:          \
    return dequantise_of<WeightType::type>(blocks, count, out);
    TWILIGHT_FOR_EACH_BLOCK_TYPE(TWILIGHT_BLOCK_CASE)
#undef TWILIGHT_BLOCK_CASE
    default:
      return;
  }
}

#undef TWILIGHT_FOR_EACH_BLOCK_TYPE

}  // namespace

const BlockKernels& block_kernels() {
  static constexpr BlockKernels kTable = {quantise, matvec, dequantise};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
