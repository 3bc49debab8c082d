#include "backend/cpu/cpu_backend.h"
#include "core/check.h"

namespace twilight::cpu {

std::size_t CpuBackend::attend_workspace_bytes(const StepCaps&) const { return 0; }
void CpuBackend::do_attend_dense(const AttendDenseParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_attend_sparse(const AttendSparseParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_attend_prefill(const AttendPrefillParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}

}  // namespace twilight::cpu
