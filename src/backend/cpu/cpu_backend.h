#ifndef TWILIGHT_BACKEND_CPU_CPU_BACKEND_H_
#define TWILIGHT_BACKEND_CPU_CPU_BACKEND_H_

#include <string>

#include "backend/cpu/dnnl_matmul.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/kernels/blocks.h"
#include "backend/cpu/kernels/index.h"
#include "backend/cpu/kernels/model.h"
#include "backend/cpu/kernels/select.h"
#include "backend/cpu/prefill_attention.h"
#include "core/thread_pool.h"
#include "ops/backend.h"

namespace twilight::cpu {

/// SIMD kernels shared out over a thread pool. Work is cut into tiles by shapes and lengths alone,
/// never by the number of threads (but rows of a product, of which none knows another), so results
/// do not depend on it.
class CpuBackend final : public Backend {
 public:
  CpuBackend(ThreadPool& pool, Isa isa);
  ~CpuBackend() override;

  [[nodiscard]] std::string name() const override { return "cpu"; }
  [[nodiscard]] std::string description() const override;
  [[nodiscard]] Support supports(const StepCaps& caps, DType cache_dtype,
                                 const IndexFormat& format) const override;
  [[nodiscard]] bool takes_weight_blocks() const override { return true; }
  [[nodiscard]] std::size_t workspace_bytes(const StepCaps& caps) const override;
  [[nodiscard]] bool has_fused_select_and_prune() const override { return true; }

 private:
  // cpu_cache.cc
  void do_append_kv(const AppendKvParams& params) override;
  void do_seal_pages(const SealPagesParams& params) override;
  void do_copy_pages(const CopyPagesParams& params) override;
  // cpu_index.cc
  [[nodiscard]] std::size_t index_workspace_bytes(const StepCaps& caps) const;
  void do_score_pages(const ScorePagesParams& params, Workspace workspace) override;
  void score_by_mass(const ScorePagesParams& params, Arena& arena);
  void do_exact_scores(const ExactScoresParams& params, Workspace workspace) override;
  void do_estimate_scores(const EstimateParams& params, Workspace workspace) override;
  // cpu_select.cc
  [[nodiscard]] std::size_t select_workspace_bytes(const StepCaps& caps) const;
  void do_select_pages(const SelectPagesParams& params, Workspace workspace) override;
  // cpu_prune.cc
  void do_prune_top_p(const PruneParams& params, Workspace workspace) override;
  // cpu_fused.cc
  [[nodiscard]] std::size_t fused_workspace_bytes(const StepCaps& caps) const;
  void do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) override;
  // cpu_attend.cc
  [[nodiscard]] std::size_t attend_workspace_bytes(const StepCaps& caps) const;
  void do_attend_dense(const AttendDenseParams& params, Workspace workspace) override;
  void do_attend_sparse(const AttendSparseParams& params, Workspace workspace) override;
  void do_attend_prefill(const AttendPrefillParams& params) override;
  // cpu_model.cc
  void do_linear(const LinearParams& params) override;
  void linear_of_blocks(const LinearParams& params);
  void linear_of_blocks_in_f32(const LinearParams& params);
  void do_rms_norm(const RmsNormParams& params) override;
  void do_rope(const RopeParams& params) override;
  void do_silu_mul(const SiluMulParams& params) override;

  ThreadPool& pool_;
  Isa isa_;
  const IndexKernels& index_;
  const SelectKernels& select_;
  const AttendKernels& attend_;
  const ModelKernels& model_;
  const BlockKernels& blocks_;
  DnnlMatmul matmul_;
  PrefillAttention prefill_;
  Buffer
      block_inputs_;  ///< activations in bytes, or a row of weights in f32 for each thread; grows
};

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_CPU_BACKEND_H_
