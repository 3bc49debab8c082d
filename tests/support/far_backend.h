#ifndef TWILIGHT_TESTS_SUPPORT_FAR_BACKEND_H_
#define TWILIGHT_TESTS_SUPPORT_FAR_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ops/backend.h"

namespace twilight::test {

/// Memory that nobody may touch except through its interface and while a FarBackend's op runs: its
/// pages have no access rights otherwise, so a stray access ends the program.
class FarMemory final : public DeviceMemory {
 public:
  FarMemory();
  ~FarMemory() override;

  [[nodiscard]] bool is_host() const override { return false; }
  [[nodiscard]] std::size_t free_bytes() const override { return free_bytes_; }
  [[nodiscard]] std::byte* allocate(std::size_t bytes) override;
  void release(std::byte* memory, std::size_t bytes) noexcept override;
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;
  void fill(void* to, int byte, std::size_t bytes) override;
  void synchronize() override;

  [[nodiscard]] bool holds(const void* pointer) const;
  /// What free_bytes answers; 0 at first.
  void set_free_bytes(std::size_t bytes) { free_bytes_ = bytes; }
  /// Bytes allocated at present.
  [[nodiscard]] std::size_t used_bytes() const { return used_; }
  /// Uploads and downloads so far.
  [[nodiscard]] std::int64_t uploads() const { return uploads_; }
  [[nodiscard]] std::int64_t downloads() const { return downloads_; }
  [[nodiscard]] std::int64_t downloaded_bytes() const { return downloaded_bytes_; }

  /// Access for as long as it lives.
  class Access {
   public:
    explicit Access(FarMemory& memory) : memory_(memory) { memory_.protect(true); }
    ~Access() { memory_.protect(false); }
    Access(const Access&) = delete;
    Access& operator=(const Access&) = delete;

   private:
    FarMemory& memory_;
  };

 private:
  friend class FarBackend;
  void protect(bool open);
  void check(const char* call, const void* far, const void* near) const;

  std::byte* base_ = nullptr;
  std::size_t top_ = 0;                       // end of what was ever allocated
  std::map<std::size_t, std::size_t> holes_;  // offset to size
  std::size_t used_ = 0;
  std::size_t free_bytes_ = 0;
  std::int64_t uploads_ = 0;
  std::int64_t downloads_ = 0;
  std::int64_t downloaded_bytes_ = 0;
  bool recording_ = false;
};

/// A host backend whose memory is far: what runs on it proves that no host code touches device
/// memory and that ops get nothing but device pointers. Lengths are read from device memory, as a
/// GPU does, and ops can be recorded like a CUDA graph: with the host memory of then and the device
/// memory of the replay.
class FarBackend final : public Backend {
 public:
  FarBackend(std::unique_ptr<Backend> inner, IndexLayout layout);
  ~FarBackend() override;

  [[nodiscard]] std::string name() const override { return "far"; }
  [[nodiscard]] std::string description() const override { return "far"; }
  [[nodiscard]] Support supports(const StepCaps& caps, DType cache_dtype,
                                 const IndexFormat& format) const override {
    return inner_->supports(caps, cache_dtype, format);
  }
  [[nodiscard]] bool takes_weight_blocks() const override {
    return takes_blocks_ && inner_->takes_weight_blocks();
  }
  [[nodiscard]] IndexLayout index_layout() const override { return layout_; }
  [[nodiscard]] DeviceMemory& memory() override { return memory_; }
  [[nodiscard]] std::size_t workspace_bytes(const StepCaps& caps) const override {
    return inner_->workspace_bytes(caps);
  }
  [[nodiscard]] bool has_fused_select_and_prune() const override {
    return inner_->has_fused_select_and_prune();
  }
  [[nodiscard]] std::unique_ptr<RecordedOps> record(const std::function<void()>& ops) override;

  [[nodiscard]] FarMemory& far_memory() { return memory_; }
  [[nodiscard]] std::int64_t replays() const { return replays_; }
  /// From then on it is a backend that wants its weights expanded.
  void refuse_blocks() { takes_blocks_ = false; }

 private:
  class Recording;
  using Op = std::function<void()>;

  void run(Op op);
  void far(const char* field, const void* pointer, bool may_be_null = false) const;
  void take(PagedKvView& kv, bool tables = true) const;
  void take(const KeyIndexView& index) const;
  void take(SeqSubset& seqs);
  template <typename T>
  void keep(const T*& values, std::int64_t count);
  void take(ScorePagesParams& p);
  void take(SelectPagesParams& p);
  void take(EstimateParams& p);
  void take(PruneParams& p);
  void take(AttendSparseParams& p);
  void take(SelectAndPruneParams& p);

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
  void do_count_tail(const CountTailParams& params, Workspace workspace) override;

  std::unique_ptr<Backend> inner_;
  IndexLayout layout_;
  FarMemory memory_;
  Recording* recording_ = nullptr;
  std::int64_t replays_ = 0;
  bool takes_blocks_ = true;
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_FAR_BACKEND_H_
