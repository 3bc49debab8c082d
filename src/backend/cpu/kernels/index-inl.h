#include "backend/cpu/kernels/index.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {

namespace hn = hwy::HWY_NAMESPACE;

const IndexKernels& index_kernels() {
  static constexpr IndexKernels kTable = {};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
