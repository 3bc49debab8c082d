#include "backend/cpu/cpu_backend.h"

#include <algorithm>

#include "backend/cpu/label_scores.h"
#include "core/check.h"

namespace twilight {
namespace cpu {

CpuBackend::CpuBackend(ThreadPool& pool, Isa isa)
    : pool_(pool),
      isa_(isa),
      index_(index_kernels(isa)),
      select_(select_kernels(isa)),
      attend_(attend_kernels(isa)),
      model_(model_kernels(isa)),
      blocks_(block_kernels(isa)),
      matmul_(pool, isa),
      prefill_(pool, isa) {}

CpuBackend::~CpuBackend() = default;

std::string CpuBackend::description() const {
  return cat("cpu (", isa_name(isa_), ", ", pool_.num_threads(),
             pool_.num_threads() == 1 ? " thread)" : " threads)");
}

Support CpuBackend::supports(const StepCaps& caps, DType /*cache_dtype*/,
                             const IndexFormat& format) const {
  if (caps.head_dim % 16 != 0 || caps.head_dim < 16 || caps.head_dim > 512) {
    return {false, cat("head_dim ", caps.head_dim, ", accepted multiples of 16 from 16 to 512")};
  }
  if (format.layout != IndexLayout::kTokenLanes) {
    return {false, "index layout kMma, accepted kTokenLanes"};
  }
  if (format.summary == SummaryKind::kLabels && caps.num_kv_heads > 0 &&
      caps.num_q_heads / caps.num_kv_heads * label_row(caps.page_size) > kLabelScratch) {
    return {false, cat("query heads of a KV head times page_size ",
                       caps.num_q_heads / caps.num_kv_heads * label_row(caps.page_size),
                       ", accepted up to ", kLabelScratch, " with selector double_sparsity")};
  }
  return {};
}

std::size_t CpuBackend::workspace_bytes(const StepCaps& caps) const {
  return std::max({index_workspace_bytes(caps), select_workspace_bytes(caps),
                   fused_workspace_bytes(caps), attend_workspace_bytes(caps)});
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(ThreadPool& pool, const std::string& isa) {
  return std::make_unique<cpu::CpuBackend>(pool, cpu::parse_isa(isa));
}

}  // namespace twilight
