#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {

namespace hn = hwy::HWY_NAMESPACE;

const AttendKernels& attend_kernels() {
  static constexpr AttendKernels kTable = {
      static_cast<int>(sizeof(hn::Vec<hn::ScalableTag<float>>))};
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
