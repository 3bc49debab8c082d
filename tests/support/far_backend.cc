#include "support/far_backend.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "core/check.h"

namespace twilight::test {
namespace {

constexpr std::size_t kReserved = std::size_t{4} << 30;  // addresses, not memory
constexpr std::size_t kPage = 4096;

std::size_t pages_of(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

FarMemory::FarMemory() {
  void* base =
      mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(base != MAP_FAILED, "far memory", "cannot reserve addresses");
  base_ = static_cast<std::byte*>(base);
}

FarMemory::~FarMemory() { munmap(base_, kReserved); }

void FarMemory::protect(bool open) {
  if (top_ == 0) return;
  const int status = mprotect(base_, top_, open ? PROT_READ | PROT_WRITE : PROT_NONE);
  require(status == 0, "far memory", "mprotect failed");
}

bool FarMemory::holds(const void* pointer) const {
  const auto* at = static_cast<const std::byte*>(pointer);
  return at >= base_ && at < base_ + top_;
}

void FarMemory::check(const char* call, const void* far, const void* near) const {
  require(!recording_, "far memory", call, " while ops are recorded");
  require(holds(far), "far memory", call, ", got a device pointer outside device memory");
  require(near == nullptr || !holds(near), "far memory", call, ", got device memory for the host");
}

std::byte* FarMemory::allocate(std::size_t bytes) {
  require(!recording_, "far memory", "allocation while ops are recorded");
  if (bytes == 0) return nullptr;
  const std::size_t size = pages_of(bytes);
  std::size_t at = top_;
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    if (hole->second < size) continue;
    at = hole->first;
    const std::size_t rest = hole->second - size;
    holes_.erase(hole);
    if (rest > 0) holes_[at + size] = rest;
    break;
  }
  if (at == top_) {
    require(top_ + size <= kReserved, "far memory", "out of addresses");
    top_ += size;
  }
  used_ += size;
  const Access access(*this);
  std::memset(base_ + at, 0, bytes);
  return base_ + at;
}

void FarMemory::release(std::byte* memory, std::size_t bytes) noexcept {
  const std::size_t size = pages_of(bytes);
  used_ -= size;
  holes_[static_cast<std::size_t>(memory - base_)] = size;
}

void FarMemory::upload(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  check("upload", to, from);
  ++uploads_;
  const Access access(*this);
  std::memcpy(to, from, bytes);
}

void FarMemory::download(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  check("download", from, to);
  ++downloads_;
  downloaded_bytes_ += static_cast<std::int64_t>(bytes);
  const Access access(*this);
  std::memcpy(to, from, bytes);
}

void FarMemory::fill(void* to, int byte, std::size_t bytes) {
  if (bytes == 0) return;
  check("fill", to, nullptr);
  const Access access(*this);
  std::memset(to, byte, bytes);
}

void FarMemory::synchronize() {
  require(!recording_, "far memory", "synchronize while ops are recorded");
}

class FarBackend::Recording final : public RecordedOps {
 public:
  explicit Recording(FarBackend& backend) : backend_(backend) {}
  void replay() override {
    ++backend_.replays_;
    for (const Op& op : ops) {
      const FarMemory::Access access(backend_.memory_);
      op();
    }
  }

  std::vector<Op> ops;
  std::vector<std::shared_ptr<void>> kept;  // host arrays of then

 private:
  FarBackend& backend_;
};

FarBackend::FarBackend(std::unique_ptr<Backend> inner, IndexLayout layout)
    : inner_(std::move(inner)), layout_(layout) {}
FarBackend::~FarBackend() = default;

std::unique_ptr<RecordedOps> FarBackend::record(const std::function<void()>& ops) {
  auto recording = std::make_unique<Recording>(*this);
  recording_ = recording.get();
  memory_.recording_ = true;
  try {
    ops();
  } catch (...) {
    recording_ = nullptr;
    memory_.recording_ = false;
    throw;
  }
  recording_ = nullptr;
  memory_.recording_ = false;
  return recording;
}

void FarBackend::run(Op op) {
  if (recording_ != nullptr) {
    recording_->ops.push_back(std::move(op));
    return;
  }
  const FarMemory::Access access(memory_);
  op();
}

void FarBackend::far(const char* field, const void* pointer, bool may_be_null) const {
  require((pointer == nullptr && may_be_null) || memory_.holds(pointer), "far backend", field,
          ", got a host pointer, accepted device memory");
}

void FarBackend::take(PagedKvView& kv, bool tables) const {
  far("k", kv.k.data);
  far("v", kv.v.data);
  if (!tables) return;
  require(kv.num_seqs == 0 || (kv.host_seq_lens != nullptr && !memory_.holds(kv.host_seq_lens)),
          "far backend", "host_seq_lens, got none in host memory");
  far("block_table", kv.block_table);
  far("seq_lens", kv.seq_lens);
  kv.host_seq_lens = nullptr;
}

void FarBackend::take(const KeyIndexView& index) const {
  far("summaries", index.summaries, true);
  far("estimates", index.estimates, true);
  far("value_means", index.value_means, true);
  far("params", index.params, true);
}

template <typename T>
void FarBackend::keep(const T*& values, std::int64_t count) {
  if (values == nullptr) return;
  require(!memory_.holds(values), "far backend", "ids or p, got device memory");
  if (recording_ == nullptr) return;
  auto copy = std::make_shared<std::vector<T>>(values, values + count);
  values = copy->data();
  recording_->kept.push_back(copy);
}

void FarBackend::take(SeqSubset& seqs) { keep(seqs.ids, seqs.count); }

void FarBackend::take(ScorePagesParams& p) {
  take(p.seqs);
  take(p.kv);
  take(p.index);
  far("q", p.q.data);
  far("scores", p.scores, true);
  far("log_masses", p.log_masses, true);
}

void FarBackend::take(SelectPagesParams& p) {
  take(p.seqs);
  take(p.kv);
  far("scores", p.scores, true);
  far("pages", p.pages);
  far("page_counts", p.page_counts);
}

void FarBackend::take(EstimateParams& p) {
  take(p.seqs);
  take(p.kv);
  take(p.index);
  far("q", p.q.data);
  far("pages", p.pages);
  far("page_counts", p.page_counts);
  far("estimates", p.estimates, true);
}

void FarBackend::take(PruneParams& p) {
  take(p.seqs);
  keep(p.p, std::int64_t{p.kv.num_seqs} * p.num_q_heads);
  take(p.kv);
  far("pages", p.pages);
  far("page_counts", p.page_counts);
  far("estimates", p.estimates, true);
  far("kept", p.kept);
  far("kept_counts", p.kept_counts);
  far("head_counts", p.head_counts);
  far("head_mass", p.head_mass);
  far("tail_mass", p.tail_mass, true);
  far("tail_shift", p.tail_shift, true);
}

void FarBackend::take(AttendSparseParams& p) {
  take(p.seqs);
  take(p.kv);
  far("q", p.q.data);
  far("kept", p.kept);
  far("kept_counts", p.kept_counts);
  far("out", p.out);
  far("tail.mass", p.tail.mass, true);
  far("tail.shift", p.tail.shift, true);
  far("tail.log_masses", p.tail.log_masses, true);
}

void FarBackend::take(SelectAndPruneParams& p) {
  if (p.select.mode == SelectMode::kByScore) take(p.score);
  take(p.select);
  if (p.prune.criterion != PruneCriterion::kNone) take(p.estimate);
  take(p.prune);
}

void FarBackend::do_append_kv(const AppendKvParams& params) {
  AppendKvParams p = params;
  take(p.kv);
  far("k", p.k);
  far("v", p.v);
  far("slots", p.slots);
  run([this, p] { inner_->append_kv(p); });
}

void FarBackend::do_seal_pages(const SealPagesParams& params) {
  SealPagesParams p = params;
  take(p.kv, false);
  take(p.index);
  far("pages", p.pages);
  run([this, p] { inner_->seal_pages(p); });
}

void FarBackend::do_copy_pages(const CopyPagesParams& params) {
  CopyPagesParams p = params;
  take(p.kv, false);
  take(p.index);
  far("from", p.from);
  far("to", p.to);
  run([this, p] { inner_->copy_pages(p); });
}

void FarBackend::do_score_pages(const ScorePagesParams& params, Workspace workspace) {
  ScorePagesParams p = params;
  take(p);
  run([this, p, workspace] { inner_->score_pages(p, workspace); });
}

void FarBackend::do_exact_scores(const ExactScoresParams& params, Workspace workspace) {
  ExactScoresParams p = params;
  take(p.seqs);
  take(p.kv);
  far("q", p.q.data);
  far("scores", p.scores);
  run([this, p, workspace] { inner_->exact_scores(p, workspace); });
}

void FarBackend::do_select_pages(const SelectPagesParams& params, Workspace workspace) {
  SelectPagesParams p = params;
  take(p);
  run([this, p, workspace] { inner_->select_pages(p, workspace); });
}

void FarBackend::do_estimate_scores(const EstimateParams& params, Workspace workspace) {
  EstimateParams p = params;
  take(p);
  run([this, p, workspace] { inner_->estimate_scores(p, workspace); });
}

void FarBackend::do_prune_top_p(const PruneParams& params, Workspace workspace) {
  PruneParams p = params;
  take(p);
  run([this, p, workspace] { inner_->prune_top_p(p, workspace); });
}

void FarBackend::do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  SelectAndPruneParams p = params;
  take(p);
  run([this, p, workspace] { inner_->select_and_prune(p, workspace); });
}

void FarBackend::do_sparse_step(const SparseStepParams& params, Workspace workspace) {
  SparseStepParams p = params;
  take(p.prune);
  take(p.attend);
  run([this, p, workspace] { inner_->sparse_step(p, workspace); });
}

void FarBackend::do_attend_dense(const AttendDenseParams& params, Workspace workspace) {
  AttendDenseParams p = params;
  take(p.seqs);
  take(p.kv);
  far("q", p.q.data);
  far("out", p.out);
  run([this, p, workspace] { inner_->attend_dense(p, workspace); });
}

void FarBackend::do_attend_sparse(const AttendSparseParams& params, Workspace workspace) {
  AttendSparseParams p = params;
  take(p);
  run([this, p, workspace] { inner_->attend_sparse(p, workspace); });
}

void FarBackend::do_attend_prefill(const AttendPrefillParams& params) {
  AttendPrefillParams p = params;
  take(p.kv);
  far("q", p.q);
  far("out", p.out);
  run([this, p] { inner_->attend_prefill(p); });
}

void FarBackend::do_linear(const LinearParams& params) {
  far("x", params.x);
  far("weight", params.weight.data);
  far("bias", params.bias, true);
  far("y", params.y);
  run([this, p = params] { inner_->linear(p); });
}

void FarBackend::do_rms_norm(const RmsNormParams& params) {
  far("x", params.x);
  far("weight", params.weight);
  far("y", params.y);
  run([this, p = params] { inner_->rms_norm(p); });
}

void FarBackend::do_rope(const RopeParams& params) {
  far("x", params.x);
  far("cos", params.cos);
  far("sin", params.sin);
  run([this, p = params] { inner_->rope(p); });
}

void FarBackend::do_silu_mul(const SiluMulParams& params) {
  far("gate", params.gate);
  far("up", params.up);
  far("y", params.y);
  run([this, p = params] { inner_->silu_mul(p); });
}

void FarBackend::do_embed(const EmbedParams& params) {
  far("table", params.table.data);
  far("tokens", params.tokens);
  far("out", params.out);
  run([this, p = params] { inner_->embed(p); });
}

void FarBackend::do_rotation(const RotationParams& params) {
  far("positions", params.positions);
  far("frequencies", params.frequencies);
  far("cos", params.cos);
  far("sin", params.sin);
  run([this, p = params] { inner_->rotation(p); });
}

void FarBackend::do_argmax(const ArgmaxParams& params) {
  far("x", params.x);
  far("out", params.out);
  run([this, p = params] { inner_->argmax(p); });
}

void FarBackend::do_sample_rows(const SampleRowsParams& params) {
  far("x", params.x);
  far("draws", params.draws);
  far("out", params.out);
  run([this, p = params] { inner_->sample_rows(p); });
}

void FarBackend::do_count_tail(const CountTailParams& params, Workspace workspace) {
  CountTailParams p = params;
  take(p.kv);
  take(p.seqs);
  take(p.tail.index);
  far("tail.mass", p.tail.mass);
  far("tail.pages", p.tail.pages);
  far("tail.page_counts", p.tail.page_counts);
  far("counts", p.counts);
  run([this, p, workspace] { inner_->count_tail(p, workspace); });
}

}  // namespace twilight::test
