#include "backend/cpu/cpu_backend.h"
#include "core/check.h"

namespace twilight::cpu {

void CpuBackend::do_append_kv(const AppendKvParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_seal_pages(const SealPagesParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}
void CpuBackend::do_copy_pages(const CopyPagesParams&) {
  fail(ErrorCode::kInternal, "cpu", "not built yet");
}

}  // namespace twilight::cpu
