#ifndef TWILIGHT_BACKEND_REF_REF_BACKEND_H_
#define TWILIGHT_BACKEND_REF_REF_BACKEND_H_

#include <string>

#include "ops/backend.h"

namespace twilight::ref {

/// Every op as plain loops with double accumulation: the definition the other backends are held to.
/// Needs no workspace; unlike them it allocates inside its ops.
class RefBackend final : public Backend {
 public:
  [[nodiscard]] std::string name() const override { return "ref"; }
  [[nodiscard]] std::string description() const override;
  [[nodiscard]] Support supports(const StepCaps& caps, DType cache_dtype,
                                 const IndexFormat& format) const override;
  [[nodiscard]] bool takes_weight_blocks() const override { return true; }
  [[nodiscard]] std::size_t workspace_bytes(const StepCaps& caps) const override;

 private:
  // ref_cache.cc
  void do_append_kv(const AppendKvParams& params) override;
  void do_seal_pages(const SealPagesParams& params) override;
  void do_copy_pages(const CopyPagesParams& params) override;
  // ref_scores.cc
  void do_score_pages(const ScorePagesParams& params, Workspace workspace) override;
  void do_exact_scores(const ExactScoresParams& params, Workspace workspace) override;
  void score_by_mass(const ScorePagesParams& params);  // ref_mass_scores.cc
  void do_estimate_scores(const EstimateParams& params, Workspace workspace) override;
  // ref_select.cc
  void do_select_pages(const SelectPagesParams& params, Workspace workspace) override;
  // ref_prune.cc
  void do_prune_top_p(const PruneParams& params, Workspace workspace) override;
  // ref_attend.cc
  void do_attend_dense(const AttendDenseParams& params, Workspace workspace) override;
  void do_attend_sparse(const AttendSparseParams& params, Workspace workspace) override;
  void do_attend_prefill(const AttendPrefillParams& params) override;
  // ref_model.cc
  void do_linear(const LinearParams& params) override;
  void do_rms_norm(const RmsNormParams& params) override;
  void do_rope(const RopeParams& params) override;
  void do_silu_mul(const SiluMulParams& params) override;
};

}  // namespace twilight::ref

#endif  // TWILIGHT_BACKEND_REF_REF_BACKEND_H_
