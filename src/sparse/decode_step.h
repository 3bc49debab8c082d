#ifndef TWILIGHT_SPARSE_DECODE_STEP_H_
#define TWILIGHT_SPARSE_DECODE_STEP_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "ops/backend.h"
#include "sparse/selector.h"
#include "twilight/policy.h"
#include "twilight/stats.h"

namespace twilight {

/// The index planes a policy reads, in the default layout.
[[nodiscard]] IndexFormat index_format_of(const SparsePolicy& policy);
/// The same in the order that the backend's kernels read, where head_dim has it.
[[nodiscard]] IndexFormat index_format_of(const SparsePolicy& policy, const Backend& backend,
                                          std::int32_t head_dim);

/// Attention of one layer for one new token of each of B sequences whose keys and values are in the
/// cache. Pointers are the backend's memory except `p` and kv.host_seq_lens.
struct DecodeStepParams {
  std::int32_t layer = 0;
  QueryView q;  ///< [B, Hq, D]
  PagedKvView kv;
  KeyIndexView index;
  /// p of each sequence in (0, 1], [B], host memory; null takes the policy's.
  const float* p = nullptr;
  float* out = nullptr;  ///< [B, Hq, D]
  std::int64_t out_seq_stride = 0;
  /// lists_bytes() of the backend's memory for what statistics read, 64-byte aligned, so that they
  /// can wait for `read_stats`; null keeps it in the workspace, for the call only.
  std::byte* lists = nullptr;
};

/// Turns a policy into ops: which sequences run dense and why, then select, estimate, prune and
/// attend for the rest. `run` allocates nothing and waits for nothing but its backend's ops, unless
/// statistics are asked of a backend with memory of its own (they are downloaded), `audit` is on or
/// the oracle selects. Not thread-safe; one per caller.
class DecodeStep {
 public:
  /// `shape` gives B, heads, D, P and the longest N; its max_candidate_pages is derived from the
  /// policy. Throws Error(kInvalidArgument / kUnsupported) for a bad policy or a shape the backend
  /// cannot run.
  DecodeStep(Backend& backend, const SparsePolicy& policy, StepCaps shape, DType cache_dtype);
  ~DecodeStep();

  /// Bytes of workspace `run` needs, in the backend's memory.
  [[nodiscard]] std::size_t workspace_bytes() const { return workspace_bytes_; }
  /// Bytes of DecodeStepParams::lists.
  [[nodiscard]] std::size_t lists_bytes() const { return lists_bytes_; }
  [[nodiscard]] const SparsePolicy& policy() const { return policy_; }
  [[nodiscard]] const StepCaps& caps() const { return caps_; }

  /// `stats`, if not empty, has B entries whose vectors are resized on first use and filled. With
  /// `audit` the true kept mass is computed too, from every key.
  void run(const DecodeStepParams& params, Workspace workspace, std::span<LayerStats> stats = {},
           bool audit = false);

  /// Statistics of a `run` with these parameters from a host copy of its `lists`, which may be null
  /// where no sequence was sparse.
  void read_stats(const DecodeStepParams& params, std::byte* host_lists,
                  std::span<LayerStats> stats) const;

  /// What `run` would do for a sequence of N tokens in a layer.
  [[nodiscard]] StepPath path_of(std::int32_t layer, std::int32_t num_tokens, float p) const;

 private:
  struct Scratch;
  /// `lists`, where not null, holds what statistics read instead of the workspace.
  [[nodiscard]] Scratch carve(std::byte* lists, void* base, std::size_t bytes) const;
  /// The lists of a step in host memory: the scratch itself, or a copy.
  [[nodiscard]] Scratch host_lists(const Scratch& scratch, Workspace workspace, bool audit);
  void run_sparse(const DecodeStepParams& params, const SeqSubset& seqs, const Scratch& scratch,
                  bool wants_lists);
  [[nodiscard]] TailParams tail_params(const DecodeStepParams& params,
                                       const Scratch& scratch) const;
  void fill_stats(const DecodeStepParams& params, const Scratch& scratch, std::int32_t seq,
                  StepPath path, LayerStats& stats) const;

  Backend& backend_;
  SparsePolicy policy_;
  std::unique_ptr<Selector> selector_;
  StepCaps caps_;
  std::size_t workspace_bytes_ = 0;
  std::size_t lists_bytes_ = 0;
  std::vector<std::int32_t> dense_ids_;   ///< [B]
  std::vector<std::int32_t> sparse_ids_;  ///< [B]
  std::vector<StepPath> paths_;           ///< [B]
  std::vector<float> p_;                  ///< [B, Hq]
  Buffer lists_;                          ///< host copy of what statistics read
};

}  // namespace twilight

#endif  // TWILIGHT_SPARSE_DECODE_STEP_H_
