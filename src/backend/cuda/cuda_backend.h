#ifndef TWILIGHT_BACKEND_CUDA_CUDA_BACKEND_H_
#define TWILIGHT_BACKEND_CUDA_CUDA_BACKEND_H_

#include <string>

#include <cuda_runtime_api.h>

#include "backend/cuda/cublas_linear.h"
#include "backend/cuda/cuda_memory.h"
#include "backend/cuda/fast/layer_products.h"
#include "backend/cuda/fast/rows_linear.h"
#include "ops/backend.h"

namespace twilight::cuda {

/// Owns a stream of one device; never null.
class Stream {
 public:
  explicit Stream(int device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  [[nodiscard]] cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Ops of one GPU as launches on one stream. Pointers of the parameter blocks are device memory,
/// except those documented as host memory; kv.host_seq_lens must hold the lengths too. Decode ops
/// read lengths on the device and size their grids by strides, so a captured step can be replayed
/// with other lengths, up to the strides' capacity; which sequences an op works on and their p are
/// part of the capture. An op allocates nothing and waits for nothing (linear: see CublasLinear).
class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  [[nodiscard]] std::string name() const override { return "cuda"; }
  [[nodiscard]] std::string description() const override { return description_; }
  [[nodiscard]] Support supports(const StepCaps& caps, DType cache_dtype,
                                 const IndexFormat& format) const override;
  [[nodiscard]] IndexLayout index_layout() const override { return IndexLayout::kMma; }
  [[nodiscard]] DeviceMemory& memory() override { return memory_; }
  [[nodiscard]] std::size_t workspace_bytes(const StepCaps& caps) const override;
  [[nodiscard]] bool has_fused_select_and_prune() const override { return true; }

  /// As a CUDA graph.
  [[nodiscard]] std::unique_ptr<RecordedOps> record(const std::function<void()>& ops) override;
  void read_through(const std::byte* data, std::size_t bytes) override;

  /// Where every op is launched; for captures and timing.
  [[nodiscard]] cudaStream_t stream() const { return stream_.get(); }
  [[nodiscard]] int device() const { return device_; }

 private:
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

  // Products of few rows, and of many with x rounded once; false, with nothing done, where the
  // shapes are others.
  [[nodiscard]] bool linear_of_few(const LinearParams& params);
  [[nodiscard]] bool project_few(const ProjectParams& params);
  [[nodiscard]] bool project_many(const ProjectParams& params);
  [[nodiscard]] bool feed_few(const FeedForwardParams& params);
  [[nodiscard]] bool feed_many(const FeedForwardParams& params);
  [[nodiscard]] bool advance_together(const AdvanceLayerParams& params);
  void norm_and_rotate(const ProjectParams& params);
  void norm_block(const RmsNormParams& norm, std::int32_t first, DType dtype);
  void reserve_rows();

  int device_;
  Stream stream_;
  CudaMemory memory_;
  CublasLinear linear_;
  /// Rows rounded to the weights' dtype: before and after a feed-forward layer's gate.
  DeviceBuffer rows_;
  DeviceBuffer gated_rows_;
  DeviceBuffer many_rows_;
  DeviceBuffer layer_memory_;  ///< of layer_products, which one stream's launches share
  cuda_fast::LayerDevice layer_device_;
  bool dependent_ = false;  ///< launches may overlap, see fast/dependent.cuh
  std::string description_;
};

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_CUDA_BACKEND_H_
