#include "backend/cpu/cpu_backend.h"
#include "core/check.h"

namespace twilight::cpu {

std::size_t CpuBackend::select_workspace_bytes(const StepCaps&) const { return 0; }
void CpuBackend::do_select_pages(const SelectPagesParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_prune_top_p(const PruneParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_select_and_prune(const SelectAndPruneParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}

}  // namespace twilight::cpu
