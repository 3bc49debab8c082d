#ifndef TWILIGHT_TESTS_CUDA_HOST_CUDA_BACKEND_H_
#define TWILIGHT_TESTS_CUDA_HOST_CUDA_BACKEND_H_

#include <memory>
#include <string>

#include "ops/backend.h"

namespace twilight::test {

/// A backend with memory of its own behind the interface of one that works on host memory: each op
/// copies what its parameters reach (padding and poison with it, at the same alignment) to the
/// device, runs there and copies back whatever the op may write. So everything that tests host
/// backends tests it too.
class MirroredBackend final : public Backend {
 public:
  explicit MirroredBackend(std::unique_ptr<Backend> inner);
  ~MirroredBackend() override;

  [[nodiscard]] std::string name() const override { return inner_->name(); }
  [[nodiscard]] std::string description() const override { return inner_->description(); }
  [[nodiscard]] Support supports(const StepCaps& caps, DType cache_dtype,
                                 const IndexFormat& format) const override {
    return inner_->supports(caps, cache_dtype, format);
  }
  [[nodiscard]] IndexLayout index_layout() const override { return inner_->index_layout(); }
  [[nodiscard]] std::size_t workspace_bytes(const StepCaps& caps) const override {
    return inner_->workspace_bytes(caps);
  }
  [[nodiscard]] bool has_fused_select_and_prune() const override {
    return inner_->has_fused_select_and_prune();
  }
  [[nodiscard]] Backend& inner() { return *inner_; }

 private:
  class Transfer;

  void do_append_kv(const AppendKvParams& params) override;
  void do_seal_pages(const SealPagesParams& params) override;
  void do_copy_pages(const CopyPagesParams& params) override;
  void do_score_pages(const ScorePagesParams& params, Workspace workspace) override;
  void do_exact_scores(const ExactScoresParams& params, Workspace workspace) override;
  void do_select_pages(const SelectPagesParams& params, Workspace workspace) override;
  void do_estimate_scores(const EstimateParams& params, Workspace workspace) override;
  void do_prune_top_p(const PruneParams& params, Workspace workspace) override;
  void do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) override;
  void do_sparse_step(const SparseStepParams& params, Workspace workspace) override;
  void do_attend_dense(const AttendDenseParams& params, Workspace workspace) override;
  void do_attend_sparse(const AttendSparseParams& params, Workspace workspace) override;
  void do_attend_prefill(const AttendPrefillParams& params) override;
  void do_linear(const LinearParams& params) override;
  void do_rms_norm(const RmsNormParams& params) override;
  void do_rope(const RopeParams& params) override;
  void do_silu_mul(const SiluMulParams& params) override;
  void do_embed(const EmbedParams& params) override;
  void do_rotation(const RotationParams& params) override;
  void do_argmax(const ArgmaxParams& params) override;
  void do_sample_rows(const SampleRowsParams& params) override;
  void do_project(const ProjectParams& params) override;
  void do_feed_forward(const FeedForwardParams& params) override;
  void do_advance_layer(const AdvanceLayerParams& params) override;
  void do_count_tail(const CountTailParams& params, Workspace workspace) override;

  std::unique_ptr<Backend> inner_;
  DeviceBuffer arena_;
};

/// Backend of cuda:0 on host memory, made once; the test program skips everything without a device.
[[nodiscard]] MirroredBackend& gpu();

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_CUDA_HOST_CUDA_BACKEND_H_
