#include "backend/cpu/cpu_backend.h"
#include "core/check.h"

namespace twilight::cpu {

std::size_t CpuBackend::index_workspace_bytes(const StepCaps&) const { return 0; }
void CpuBackend::do_score_pages(const ScorePagesParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_exact_scores(const ExactScoresParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_estimate_scores(const EstimateParams&, Workspace) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}

}  // namespace twilight::cpu
