#include "cuda/host_cuda_backend.h"

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <map>
#include <vector>

#include <gtest/gtest.h>

#include "core/check.h"

namespace twilight::test {
namespace {

constexpr std::size_t kArenaBytes = std::size_t{1} << 30;

std::int64_t last_page(const PagedKvView& kv) {
  std::int64_t last = -1;
  for (std::int64_t seq = 0; seq < kv.num_seqs; ++seq) {
    for (std::int64_t i = 0; i < kv.total_pages(seq); ++i) {
      last = std::max<std::int64_t>(last, kv.page_of(seq, i));
    }
  }
  return last;
}

}  // namespace

/// One op's copies.
class MirroredBackend::Transfer {
 public:
  explicit Transfer(MirroredBackend& backend)
      : memory_(backend.inner_->memory()), arena_(backend.arena_) {}

  /// Device address of host memory the op reads; at the same place relative to 256 bytes.
  template <typename T>
  [[nodiscard]] T* in(T* host, std::int64_t count) {
    return place(host, count, false);
  }
  /// The same where it may write.
  template <typename T>
  [[nodiscard]] T* out(T* host, std::int64_t count) {
    return place(host, count, true);
  }

  void query(QueryView& q, const PagedKvView& kv) {
    if (kv.num_seqs == 0) return;
    q.data = in(q.data, (kv.num_seqs - 1) * q.seq_stride + std::int64_t{q.num_heads} * kv.head_dim);
  }
  void plane(PagePlane& plane, const PagedKvView& kv, std::int64_t last, bool writes) {
    if (plane.data == nullptr || last < 0) return;
    const std::int64_t elements = last * plane.page_stride +
                                  (kv.num_kv_heads - 1) * plane.head_stride +
                                  (kv.page_size - 1) * plane.token_stride + kv.head_dim;
    plane.data = place(plane.data, elements * dtype_bytes(kv.dtype), writes);
  }
  void tables(PagedKvView& kv) {
    if (kv.seq_lens == nullptr) return;
    kv.host_seq_lens = kv.seq_lens;
    if (kv.block_table != nullptr && kv.num_seqs > 0) {
      std::int64_t columns = 0;
      for (std::int64_t seq = 0; seq < kv.num_seqs; ++seq) {
        columns = std::max<std::int64_t>(columns, kv.total_pages(seq));
      }
      // The last row may end after its own pages.
      kv.block_table = in(kv.block_table, (kv.num_seqs - 1) * kv.block_table_stride + columns);
    }
    kv.seq_lens = in(kv.seq_lens, kv.num_seqs);
  }
  /// Caches of all sequences, read only.
  void cache(PagedKvView& kv, std::int64_t last) {
    plane(kv.k, kv, last, false);
    plane(kv.v, kv, last, false);
    tables(kv);
  }
  void index(KeyIndexView& index, const PagedKvView& kv, std::int64_t last, bool writes) {
    if (last < 0) return;
    const auto records = [&](std::byte*& data, std::int64_t page_stride, std::int64_t head_stride,
                             std::int64_t bytes) {
      if (data == nullptr || bytes == 0) return;
      data = place(data, last * page_stride + (kv.num_kv_heads - 1) * head_stride + bytes, writes);
    };
    const IndexFormat& format = index.format;
    records(index.summaries, index.summary_page_stride, index.summary_head_stride,
            summary_record_bytes(format, kv.page_size, kv.head_dim));
    records(index.estimates, index.estimate_page_stride, index.estimate_head_stride,
            estimate_record_bytes(format, kv.page_size, kv.head_dim));
    records(index.value_means, index.value_page_stride, index.value_head_stride,
            format.value_bits == 0 ? 0 : nibble_bytes(kv.head_dim));
    records(index.params, index.params_page_stride, index.params_head_stride,
            format.has_params() ? static_cast<std::int64_t>(sizeof(PageParams)) : 0);
  }
  [[nodiscard]] Workspace workspace(Workspace host) {
    if (host.bytes == 0) return {};
    return {take(host.bytes, 0), host.bytes};
  }

  /// Copies back; throws what kernels left.
  void finish() {
    memory_.synchronize();
    for (const auto& [host, copy] : copies_) {
      if (copy.writes) memory_.download(const_cast<std::byte*>(host), copy.device, copy.bytes);
    }
  }

  void score(ScorePagesParams& p) {
    const std::int64_t last = last_page(p.kv);
    const PagedKvView kv = p.kv;
    query(p.q, kv);
    index(p.index, kv, last, false);
    p.scores = out(p.scores, std::int64_t{kv.num_seqs} * kv.num_kv_heads * p.page_stride);
    p.log_masses = out(p.log_masses, std::int64_t{kv.num_seqs} * p.q.num_heads * p.page_stride);
    cache(p.kv, last);
  }
  void select(SelectPagesParams& p) {
    const std::int64_t rows = std::int64_t{p.kv.num_seqs} * p.kv.num_kv_heads;
    p.scores = in(p.scores, rows * p.page_stride);
    p.pages = out(p.pages, rows * p.candidate_stride);
    p.page_counts = out(p.page_counts, rows);
    tables(p.kv);
  }
  void estimate(EstimateParams& p) {
    const std::int64_t last = last_page(p.kv);
    const PagedKvView kv = p.kv;
    const std::int64_t rows = std::int64_t{kv.num_seqs} * kv.num_kv_heads;
    query(p.q, kv);
    index(p.index, kv, last, false);
    p.pages = in(p.pages, rows * p.candidate_stride);
    p.page_counts = in(p.page_counts, rows);
    p.estimates = out(p.estimates, std::int64_t{kv.num_seqs} * p.q.num_heads * p.estimate_stride);
    cache(p.kv, last);
  }
  void prune(PruneParams& p) {
    const std::int64_t rows = std::int64_t{p.kv.num_seqs} * p.kv.num_kv_heads;
    const std::int64_t heads = std::int64_t{p.kv.num_seqs} * p.num_q_heads;
    p.pages = in(p.pages, rows * p.candidate_stride);
    p.page_counts = in(p.page_counts, rows);
    p.estimates = out(p.estimates, heads * p.estimate_stride);
    p.kept = out(p.kept, rows * p.kept_stride);
    p.kept_counts = out(p.kept_counts, rows);
    p.head_counts = out(p.head_counts, heads);
    p.head_mass = out(p.head_mass, heads);
    p.tail_mass = out(p.tail_mass, heads * p.candidate_stride);
    p.tail_shift = out(p.tail_shift, heads);
    tables(p.kv);
  }
  void select_and_prune(SelectAndPruneParams& p) {
    if (p.select.mode == SelectMode::kByScore) score(p.score);
    select(p.select);
    if (p.prune.criterion != PruneCriterion::kNone) estimate(p.estimate);
    prune(p.prune);
  }
  void attend(AttendSparseParams& p) {
    const std::int64_t last = last_page(p.kv);
    const PagedKvView kv = p.kv;
    const std::int64_t rows = std::int64_t{kv.num_seqs} * kv.num_kv_heads;
    const std::int64_t heads = std::int64_t{kv.num_seqs} * p.q.num_heads;
    p.kept = in(p.kept, rows * p.kept_stride);
    p.kept_counts = in(p.kept_counts, rows);
    TailParams& tail = p.tail;
    if (tail.mass != nullptr) {
      tail.mass = in(tail.mass, heads * tail.candidate_stride);
      tail.shift = in(tail.shift, heads);
      tail.pages = in(tail.pages, rows * tail.candidate_stride);
      tail.page_counts = in(tail.page_counts, rows);
      tail.log_masses = in(tail.log_masses, heads * tail.page_stride);
      tail.scores = in(tail.scores, tail.log_masses == nullptr ? 0 : rows * tail.page_stride);
      index(tail.index, kv, last, false);
    }
    p.out = output(p.out, p.out_seq_stride, p.q, kv);
    query(p.q, kv);
    cache(p.kv, last);
  }
  /// All of a product but its x.
  void product(LinearParams& p) {
    const WeightView& w = p.weight;
    p.y = out(p.y, (p.num_rows - 1) * p.y_stride + w.rows);
    p.bias = in(p.bias, w.rows);
    p.weight.data = in(w.data, w.rows * w.cols * dtype_bytes(w.dtype));
  }
  void norm(RmsNormParams& p) {
    const std::int64_t count = p.num_rows * p.hidden;
    p.y = out(p.y, count);
    p.x = in(p.x, count);
    p.weight = in(p.weight, p.hidden);
  }
  void rope(RopeParams& p) {
    const std::int64_t half = std::int64_t{p.num_tokens} * (p.head_dim / 2);
    p.x = out(p.x, (p.num_tokens - 1) * p.token_stride + std::int64_t{p.num_heads} * p.head_dim);
    p.cos = in(p.cos, half);
    p.sin = in(p.sin, half);
  }
  void project(ProjectParams& p) {
    norm(p.norm);
    for (LinearParams* linear : {&p.q, &p.k, &p.v}) {
      linear->x = p.norm.y;
      product(*linear);
    }
    if (p.q_norm.weight != nullptr) norm(p.q_norm);
    if (p.k_norm.weight != nullptr) norm(p.k_norm);
    rope(p.q_rope);
    rope(p.k_rope);
  }
  /// All but k and v.
  void append(AppendKvParams& p) {
    const std::int64_t last = *std::max_element(p.slots, p.slots + p.num_tokens) / p.kv.page_size;
    p.slots = in(p.slots, p.num_tokens);
    const PagedKvView kv = p.kv;
    plane(p.kv.k, kv, last, true);
    plane(p.kv.v, kv, last, true);
  }
  void feed(FeedForwardParams& p) {
    norm(p.norm);
    p.gate.x = p.up.x = p.norm.y;
    product(p.gate);
    product(p.up);
    p.down.x = p.gate.y;
    product(p.down);
  }
  [[nodiscard]] float* output(float* host, std::int64_t stride, const QueryView& q,
                              const PagedKvView& kv) {
    if (kv.num_seqs == 0) return host;
    return out(host, (kv.num_seqs - 1) * stride + std::int64_t{q.num_heads} * kv.head_dim);
  }

 private:
  struct Copy {
    std::byte* device = nullptr;
    std::size_t bytes = 0;
    bool writes = false;
  };

  template <typename T>
  [[nodiscard]] T* place(T* host, std::int64_t count, bool writes) {
    if (host == nullptr || count <= 0) return host == nullptr ? nullptr : host;
    const auto* bytes = reinterpret_cast<const std::byte*>(host);
    Copy& copy = copies_[bytes];
    if (copy.device == nullptr) {
      copy.bytes = static_cast<std::size_t>(count) * sizeof(T);
      copy.device = take(copy.bytes, reinterpret_cast<std::uintptr_t>(host) % 256);
      memory_.upload(copy.device, host, copy.bytes);
    }
    require(copy.bytes >= static_cast<std::size_t>(count) * sizeof(T), "mirror",
            "one pointer with two sizes");
    copy.writes = copy.writes || writes;
    return reinterpret_cast<T*>(copy.device);
  }
  [[nodiscard]] std::byte* take(std::size_t bytes, std::size_t offset) {
    const std::size_t begin = (used_ + 255) / 256 * 256 + offset;
    used_ = begin + bytes + 256;
    require(used_ <= arena_.size(), "mirror", "op needs ", used_, " bytes");
    return arena_.data() + begin;
  }

  DeviceMemory& memory_;
  DeviceBuffer& arena_;
  std::map<const std::byte*, Copy> copies_;
  std::size_t used_ = 0;
};

MirroredBackend::MirroredBackend(std::unique_ptr<Backend> inner)
    : inner_(std::move(inner)), arena_(inner_->memory(), kArenaBytes) {}

MirroredBackend::~MirroredBackend() = default;

void MirroredBackend::do_append_kv(const AppendKvParams& params) {
  AppendKvParams p = params;
  if (p.num_tokens == 0) return;
  Transfer t(*this);
  const std::int64_t row = std::int64_t{p.kv.num_kv_heads} * p.kv.head_dim;
  p.k = t.in(p.k, (p.num_tokens - 1) * p.k_token_stride + row);
  p.v = t.in(p.v, (p.num_tokens - 1) * p.v_token_stride + row);
  t.append(p);
  inner_->append_kv(p);
  t.finish();
}

void MirroredBackend::do_seal_pages(const SealPagesParams& params) {
  SealPagesParams p = params;
  if (p.num_pages == 0) return;
  Transfer t(*this);
  const std::int64_t last = *std::max_element(p.pages, p.pages + p.num_pages);
  const PagedKvView kv = p.kv;
  t.plane(p.kv.k, kv, last, false);
  t.plane(p.kv.v, kv, last, false);
  t.index(p.index, kv, last, true);
  p.pages = t.in(p.pages, p.num_pages);
  inner_->seal_pages(p);
  t.finish();
}

void MirroredBackend::do_copy_pages(const CopyPagesParams& params) {
  CopyPagesParams p = params;
  if (p.num_pages == 0) return;
  Transfer t(*this);
  const std::int64_t last = std::max(*std::max_element(p.from, p.from + p.num_pages),
                                     *std::max_element(p.to, p.to + p.num_pages));
  const PagedKvView kv = p.kv;
  t.plane(p.kv.k, kv, last, true);
  t.plane(p.kv.v, kv, last, true);
  t.index(p.index, kv, last, true);
  p.from = t.in(p.from, p.num_pages);
  p.to = t.in(p.to, p.num_pages);
  inner_->copy_pages(p);
  t.finish();
}

void MirroredBackend::do_score_pages(const ScorePagesParams& params, Workspace workspace) {
  ScorePagesParams p = params;
  Transfer t(*this);
  t.score(p);
  inner_->score_pages(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_exact_scores(const ExactScoresParams& params, Workspace workspace) {
  ExactScoresParams p = params;
  Transfer t(*this);
  const std::int64_t last = last_page(p.kv);
  t.query(p.q, p.kv);
  // The last row ends with its sequence.
  const std::int64_t rows = std::int64_t{p.kv.num_seqs} * p.q.num_heads;
  if (rows > 0) {
    p.scores = t.out(p.scores, (rows - 1) * p.token_stride + p.kv.host_len(p.kv.num_seqs - 1));
  }
  t.cache(p.kv, last);
  inner_->exact_scores(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_select_pages(const SelectPagesParams& params, Workspace workspace) {
  SelectPagesParams p = params;
  Transfer t(*this);
  t.select(p);
  inner_->select_pages(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_estimate_scores(const EstimateParams& params, Workspace workspace) {
  EstimateParams p = params;
  Transfer t(*this);
  t.estimate(p);
  inner_->estimate_scores(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_prune_top_p(const PruneParams& params, Workspace workspace) {
  PruneParams p = params;
  Transfer t(*this);
  t.prune(p);
  inner_->prune_top_p(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  SelectAndPruneParams p = params;
  Transfer t(*this);
  t.select_and_prune(p);
  inner_->select_and_prune(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_sparse_step(const SparseStepParams& params, Workspace workspace) {
  SparseStepParams p = params;
  Transfer t(*this);
  t.select_and_prune(p.prune);
  t.attend(p.attend);
  inner_->sparse_step(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_attend_dense(const AttendDenseParams& params, Workspace workspace) {
  AttendDenseParams p = params;
  Transfer t(*this);
  const std::int64_t last = last_page(p.kv);
  p.out = t.output(p.out, p.out_seq_stride, p.q, p.kv);
  t.query(p.q, p.kv);
  t.cache(p.kv, last);
  inner_->attend_dense(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_attend_sparse(const AttendSparseParams& params, Workspace workspace) {
  AttendSparseParams p = params;
  Transfer t(*this);
  t.attend(p);
  inner_->attend_sparse(p, t.workspace(workspace));
  t.finish();
}

void MirroredBackend::do_attend_prefill(const AttendPrefillParams& params) {
  AttendPrefillParams p = params;
  if (p.num_tokens == 0) return;
  Transfer t(*this);
  const std::int64_t row = std::int64_t{p.num_q_heads} * p.kv.head_dim;
  p.q = t.in(p.q, (p.num_tokens - 1) * p.q_token_stride + row);
  p.out = t.out(p.out, (p.num_tokens - 1) * p.out_token_stride + row);
  t.cache(p.kv, last_page(p.kv));
  inner_->attend_prefill(p);
  t.finish();
}

void MirroredBackend::do_linear(const LinearParams& params) {
  LinearParams p = params;
  if (p.num_rows == 0) return;
  Transfer t(*this);
  p.x = t.in(p.x, (p.num_rows - 1) * p.x_stride + p.weight.cols);
  t.product(p);
  inner_->linear(p);
  t.finish();
}

void MirroredBackend::do_rms_norm(const RmsNormParams& params) {
  RmsNormParams p = params;
  Transfer t(*this);
  t.norm(p);
  inner_->rms_norm(p);
  t.finish();
}

void MirroredBackend::do_rope(const RopeParams& params) {
  RopeParams p = params;
  if (p.num_tokens == 0) return;
  Transfer t(*this);
  t.rope(p);
  inner_->rope(p);
  t.finish();
}

void MirroredBackend::do_silu_mul(const SiluMulParams& params) {
  SiluMulParams p = params;
  Transfer t(*this);
  p.gate = t.in(p.gate, p.count);
  p.up = t.in(p.up, p.count);
  p.y = t.out(p.y, p.count);
  inner_->silu_mul(p);
  t.finish();
}

void MirroredBackend::do_embed(const EmbedParams& params) {
  EmbedParams p = params;
  if (p.num_tokens == 0) return;
  Transfer t(*this);
  p.out = t.out(p.out, p.num_tokens * p.table.cols);
  p.tokens = t.in(p.tokens, p.num_tokens);
  p.table.data = t.in(p.table.data, p.table.rows * p.table.cols * dtype_bytes(p.table.dtype));
  inner_->embed(p);
  t.finish();
}

void MirroredBackend::do_rotation(const RotationParams& params) {
  RotationParams p = params;
  Transfer t(*this);
  p.positions = t.in(p.positions, p.num_tokens);
  p.frequencies = t.in(p.frequencies, p.half);
  p.cos = t.out(p.cos, std::int64_t{p.num_tokens} * p.half);
  p.sin = t.out(p.sin, std::int64_t{p.num_tokens} * p.half);
  inner_->rotation(p);
  t.finish();
}

void MirroredBackend::do_argmax(const ArgmaxParams& params) {
  ArgmaxParams p = params;
  Transfer t(*this);
  p.x = t.in(p.x, p.num_rows * p.cols);
  p.out = t.out(p.out, p.num_rows);
  inner_->argmax(p);
  t.finish();
}

void MirroredBackend::do_sample_rows(const SampleRowsParams& params) {
  SampleRowsParams p = params;
  Transfer t(*this);
  p.x = t.in(p.x, p.num_rows * p.cols);
  p.draws = t.in(p.draws, p.num_rows);
  p.out = t.out(p.out, p.num_rows);
  inner_->sample_rows(p);
  t.finish();
}

void MirroredBackend::do_project(const ProjectParams& params) {
  ProjectParams p = params;
  if (p.norm.num_rows == 0) return;
  Transfer t(*this);
  t.project(p);
  inner_->project(p);
  t.finish();
}

void MirroredBackend::do_feed_forward(const FeedForwardParams& params) {
  FeedForwardParams p = params;
  if (p.norm.num_rows == 0) return;
  Transfer t(*this);
  t.feed(p);
  inner_->feed_forward(p);
  t.finish();
}

void MirroredBackend::do_advance_layer(const AdvanceLayerParams& params) {
  AdvanceLayerParams p = params;
  if (p.out.num_rows == 0) return;
  Transfer t(*this);
  p.out.x = t.in(p.out.x, (p.out.num_rows - 1) * p.out.x_stride + p.out.weight.cols);
  t.product(p.out);
  t.feed(p.feed);
  ProjectParams next;
  if (p.next != nullptr) {
    next = *p.next;
    t.project(next);
    p.next = &next;
  }
  AppendKvParams append;
  if (p.append != nullptr) {
    append = *p.append;
    append.k = next.k.y;
    append.v = next.v.y;
    t.append(append);
    p.append = &append;
  }
  inner_->advance_layer(p);
  t.finish();
}

void MirroredBackend::do_count_tail(const CountTailParams& params, Workspace workspace) {
  CountTailParams p = params;
  Transfer t(*this);
  const std::int64_t rows = std::int64_t{p.kv.num_seqs} * p.kv.num_kv_heads;
  const std::int64_t heads = std::int64_t{p.kv.num_seqs} * p.num_q_heads;
  TailParams& tail = p.tail;
  tail.mass = t.in(tail.mass, heads * tail.candidate_stride);
  tail.pages = t.in(tail.pages, rows * tail.candidate_stride);
  tail.page_counts = t.in(tail.page_counts, rows);
  if (tail.log_masses != nullptr) tail.scores = t.in(tail.scores, rows * tail.page_stride);
  p.counts = t.out(p.counts, rows);
  t.tables(p.kv);
  inner_->count_tail(p, t.workspace(workspace));
  t.finish();
}

MirroredBackend& gpu() {
  static MirroredBackend backend(make_cuda_backend(0));
  return backend;
}

namespace {

class DeviceNeeded final : public ::testing::Environment {
 public:
  void SetUp() override {
    try {
      std::cout << gpu().description() << '\n';
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
      GTEST_SKIP() << "no CUDA device: " << error.what();
    }
  }
};

[[maybe_unused]] const auto* const kDeviceNeeded =
    ::testing::AddGlobalTestEnvironment(new DeviceNeeded);

}  // namespace
}  // namespace twilight::test
