#include "backend/cpu/cpu_backend.h"
#include "core/check.h"

namespace twilight::cpu {

void CpuBackend::do_linear(const LinearParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_rms_norm(const RmsNormParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_rope(const RopeParams&) { fail(ErrorCode::kInternal, "cpu", "not built yet"); }
void CpuBackend::do_silu_mul(const SiluMulParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}

}  // namespace twilight::cpu
