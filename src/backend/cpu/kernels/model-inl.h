#include "backend/cpu/kernels/model.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {

namespace hn = hwy::HWY_NAMESPACE;

const ModelKernels& model_kernels() {
  static constexpr ModelKernels kTable = {
      static_cast<int>(sizeof(hn::Vec<hn::ScalableTag<float>>))};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
