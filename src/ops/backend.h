#ifndef TWILIGHT_OPS_BACKEND_H_
#define TWILIGHT_OPS_BACKEND_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/device_memory.h"
#include "ops/block_params.h"
#include "ops/params.h"
#include "ops/sample_row.h"

namespace twilight {

class ThreadPool;

/// Answer of a support query: supported, or a reason a user can read.
struct Support {
  bool ok = true;
  std::string reason;

  explicit operator bool() const { return ok; }
};

/// The fused form of score, select, estimate and prune, where a backend has one: the four parameter
/// blocks describe the same step; intermediate buffers (scores, estimates) may be null and then
/// stay in the backend's own scratch.
struct SelectAndPruneParams {
  ScorePagesParams score;  ///< ignored unless select.mode is kByScore
  SelectPagesParams select;
  EstimateParams estimate;  ///< ignored where prune.criterion is kNone
  PruneParams prune;
};

/// A sparse step whole: select_and_prune, then attend_sparse over what it kept. Lists between the
/// two (pages, kept, tail) are given, as statistics read them.
struct SparseStepParams {
  SelectAndPruneParams prune;
  AttendSparseParams attend;
  /// Whether the lists, counts and masses of `prune` are read afterwards. A backend that needs none
  /// of them itself may otherwise leave them unwritten.
  bool wants_lists = true;
};

/// Calls of ops, to be made again with what is then in memory. Must not outlive its backend.
class RecordedOps {
 public:
  virtual ~RecordedOps();
  virtual void replay() = 0;
};

/// The seam between what is decided (sparse, model, engine) and how it is computed. One coarse
/// virtual call per op and layer. The public functions check their parameters once, the same for
/// every backend, and throw Error(kInvalidArgument); the do_ functions trust them. An op allocates
/// nothing and waits for nothing but its own work. Not thread-safe: one caller at a time per
/// backend.
class Backend {
 public:
  virtual ~Backend();

  /// "ref", "cpu" or "cuda".
  [[nodiscard]] virtual std::string name() const = 0;
  /// One line for people: name, instruction set or device, threads.
  [[nodiscard]] virtual std::string description() const = 0;
  /// Whether decode ops run for these shapes; the reason names the axis that does not fit.
  [[nodiscard]] virtual Support supports(const StepCaps& caps, DType cache_dtype,
                                         const IndexFormat& format) const = 0;
  /// Whether `linear` takes weights in quantised blocks.
  [[nodiscard]] virtual bool takes_weight_blocks() const { return false; }
  /// Order of the index codes that this backend's kernels read.
  [[nodiscard]] virtual IndexLayout index_layout() const { return IndexLayout::kTokenLanes; }
  /// What the ops' pointers point at (except fields documented as host memory): ordinary host
  /// memory unless the backend has its own.
  [[nodiscard]] virtual DeviceMemory& memory() { return host_memory(); }
  /// Scratch one decode op may need, the largest over the ops.
  [[nodiscard]] virtual std::size_t workspace_bytes(const StepCaps& caps) const = 0;

  /// Records the ops that `ops` calls instead of running them, host memory of their parameters as
  /// it is now; null, with `ops` not called, where the backend has no faster way to repeat them.
  /// Every op must have run once with these shapes, and `ops` must not touch memory().
  [[nodiscard]] virtual std::unique_ptr<RecordedOps> record(const std::function<void()>& ops);
  /// Reads that many bytes of memory() once, as fast as it goes; throws Error(kUnsupported) where
  /// that is host memory.
  virtual void read_through(const std::byte* data, std::size_t bytes);

  void append_kv(const AppendKvParams& params);
  void seal_pages(const SealPagesParams& params);
  void copy_pages(const CopyPagesParams& params);

  void score_pages(const ScorePagesParams& params, Workspace workspace);
  void exact_scores(const ExactScoresParams& params, Workspace workspace);
  void select_pages(const SelectPagesParams& params, Workspace workspace);
  void estimate_scores(const EstimateParams& params, Workspace workspace);
  void prune_top_p(const PruneParams& params, Workspace workspace);
  /// All four at once; same results as one after the other.
  void select_and_prune(const SelectAndPruneParams& params, Workspace workspace);
  [[nodiscard]] virtual bool has_fused_select_and_prune() const { return false; }

  /// select_and_prune and attend_sparse; same results as one after the other.
  void sparse_step(const SparseStepParams& params, Workspace workspace);

  void attend_dense(const AttendDenseParams& params, Workspace workspace);
  void attend_sparse(const AttendSparseParams& params, Workspace workspace);
  void attend_prefill(const AttendPrefillParams& params);

  void linear(const LinearParams& params);
  void rms_norm(const RmsNormParams& params);
  void rope(const RopeParams& params);
  void silu_mul(const SiluMulParams& params);

  void embed(const EmbedParams& params);
  void rotation(const RotationParams& params);
  void argmax(const ArgmaxParams& params);
  void sample_rows(const SampleRowsParams& params);
  /// Same results as rms_norm, linear, rope and silu_mul one after the other; a backend may skip
  /// what their parameters call scratch, and round where `linear` would.
  void project(const ProjectParams& params);
  void feed_forward(const FeedForwardParams& params);
  /// Same results as `linear`, `feed_forward`, `project` and `append_kv`, up to the order of sums.
  void advance_layer(const AdvanceLayerParams& params);
  void count_tail(const CountTailParams& params, Workspace workspace);

 protected:
  /// The parts one after the other.
  virtual void do_project(const ProjectParams& params);
  virtual void do_feed_forward(const FeedForwardParams& params);
  virtual void do_advance_layer(const AdvanceLayerParams& params);

 private:
  virtual void do_append_kv(const AppendKvParams& params) = 0;
  virtual void do_seal_pages(const SealPagesParams& params) = 0;
  virtual void do_copy_pages(const CopyPagesParams& params) = 0;
  virtual void do_score_pages(const ScorePagesParams& params, Workspace workspace) = 0;
  virtual void do_exact_scores(const ExactScoresParams& params, Workspace workspace) = 0;
  virtual void do_select_pages(const SelectPagesParams& params, Workspace workspace) = 0;
  virtual void do_estimate_scores(const EstimateParams& params, Workspace workspace) = 0;
  virtual void do_prune_top_p(const PruneParams& params, Workspace workspace) = 0;
  virtual void do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace);
  virtual void do_sparse_step(const SparseStepParams& params, Workspace workspace);
  virtual void do_attend_dense(const AttendDenseParams& params, Workspace workspace) = 0;
  virtual void do_attend_sparse(const AttendSparseParams& params, Workspace workspace) = 0;
  virtual void do_attend_prefill(const AttendPrefillParams& params) = 0;
  virtual void do_linear(const LinearParams& params) = 0;
  virtual void do_rms_norm(const RmsNormParams& params) = 0;
  virtual void do_rope(const RopeParams& params) = 0;
  virtual void do_silu_mul(const SiluMulParams& params) = 0;
  // On host memory, one thread.
  virtual void do_embed(const EmbedParams& params);
  virtual void do_rotation(const RotationParams& params);
  virtual void do_argmax(const ArgmaxParams& params);
  virtual void do_sample_rows(const SampleRowsParams& params);
  virtual void do_count_tail(const CountTailParams& params, Workspace workspace);

  SampleOrder sample_order_;  // of do_sample_rows; grows with the longest row once
};

/// Scalar reference, double accumulation, one thread.
[[nodiscard]] std::unique_ptr<Backend> make_ref_backend();

/// SIMD backend. `isa` is "auto", "scalar", "avx2", "avx512", "avx512_bf16" or "neon"; a name that
/// is unknown, or that this machine or build lacks, throws and lists the ones available. `pool`
/// must outlive it.
[[nodiscard]] std::unique_ptr<Backend> make_cpu_backend(ThreadPool& pool, const std::string& isa);

/// CUDA backend; throws Error(kUnsupported) where the build has none.
[[nodiscard]] std::unique_ptr<Backend> make_cuda_backend(int device);

/// A line for each GPU that make_cuda_backend takes, by number: "NVIDIA H100 (sm_90, 79 GiB)".
/// Empty without any, or in a build without CUDA.
[[nodiscard]] std::vector<std::string> cuda_devices();
/// Whether this build has the CUDA backend.
[[nodiscard]] bool has_cuda_backend();

}  // namespace twilight

#endif  // TWILIGHT_OPS_BACKEND_H_
