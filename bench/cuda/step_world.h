#ifndef TWILIGHT_BENCH_CUDA_STEP_WORLD_H_
#define TWILIGHT_BENCH_CUDA_STEP_WORLD_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cudnn_attention.h"
#include "backend/cuda/fast/fast_step.h"
#include "bench_data.h"

/// What step_bench times: caches of one shape on the device, the sparse and the dense step over
/// them, and their times in a graph. An error of CUDA ends the program.
namespace twilight {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

template <typename T>
T* device_array(std::size_t count) {
  void* p = nullptr;
  check(cudaMalloc(&p, count * sizeof(T) + 256), "cudaMalloc");
  return static_cast<T*>(p);
}

struct Times {
  double median = 0;
  double low = 0;
  double high = 0;
};

/// Microseconds a step of a graph that `body` fills with `steps` steps.
inline Times time_graph(int steps, const std::function<void(cudaStream_t)>& body) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "stream");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  body(stream);
  check(cudaStreamEndCapture(stream, &graph), "end of capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "graph");
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < 2; ++i) cudaGraphLaunch(exec, stream);
  std::vector<double> us;
  for (int i = 0; i < 9; ++i) {
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(end, stream);
    check(cudaEventSynchronize(end), "replay");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    us.push_back(1e3 * ms / steps);
  }
  std::sort(us.begin(), us.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return {us[us.size() / 2], us.front(), us.back()};
}

enum class Preset { kAdaptive, kHalves, kCentroid, kPaper };
constexpr const char* kPresetNames[] = {"adaptive", "halves", "centroid", "paper"};

struct Config {
  int kv_heads = 8;
  int batch = 1;
  int ctx = 32768;
  Preset preset = Preset::kAdaptive;
  double fraction = 0.25;
  double p = 0;  ///< 0: the preset's

  [[nodiscard]] bool paper() const { return preset == Preset::kPaper; }
  [[nodiscard]] const char* name() const { return kPresetNames[static_cast<int>(preset)]; }
  [[nodiscard]] float top_p() const {
    return static_cast<float>(p > 0 ? p : (paper() ? 0.95 : 0.85));
  }
};

inline std::string text(const char* format, auto... args) {
  char buffer[512];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

/// The caches of one (KV heads, context): as many sequences as the pool holds.
class World {
 public:
  static constexpr int kQueryHeads = 32;
  static constexpr int kDim = 128;

  World(int kv_heads, int ctx, Preset preset) : kv_heads_(kv_heads), ctx_(ctx) {
    // 8.6 GB of keys and values, or one batch of 64 where that is more.
    seqs_ =
        static_cast<int>(std::max<std::int64_t>(std::int64_t{64} * 32768 * 8 / kv_heads / ctx, 16));
    pages_ = static_cast<std::int64_t>(seqs_) * ctx / 16;
    const std::size_t rows = static_cast<std::size_t>(pages_) * 16 * kv_heads;
    k_ = device_array<std::byte>(rows * kDim * 2);
    v_ = device_array<std::byte>(rows * kDim * 2);
    const std::size_t records = static_cast<std::size_t>(pages_) * kv_heads;
    format_ = preset == Preset::kPaper
                  ? IndexFormat{SummaryKind::kQuestBf16, 4, 0, IndexLayout::kMma}
                  : IndexFormat{preset == Preset::kCentroid ? SummaryKind::kCentroid
                                : preset == Preset::kHalves ? SummaryKind::kHalfCentroid
                                                            : SummaryKind::kSubCentroid,
                                2, 4, IndexLayout::kMma};
    index_.format = format_;
    const auto pool = [&](std::byte*& data, std::int64_t& page, std::int64_t& head,
                          std::int64_t bytes) {
      if (bytes == 0) return;
      data = device_array<std::byte>(records * static_cast<std::size_t>(bytes));
      page = bytes;
      head = bytes * pages_;
    };
    pool(index_.summaries, index_.summary_page_stride, index_.summary_head_stride,
         summary_record_bytes(format_.summary, kDim));
    pool(index_.estimates, index_.estimate_page_stride, index_.estimate_head_stride,
         estimate_record_bytes(format_, 16, kDim));
    pool(index_.value_means, index_.value_page_stride, index_.value_head_stride,
         format_.value_bits == 0 ? 0 : nibble_bytes(kDim));
    pool(index_.params, index_.params_page_stride, index_.params_head_stride,
         format_.has_params() ? sizeof(PageParams) : 0);
    // As KvStorage lays them out.
    index_.params_page_stride *= kv_heads_;
    index_.params_head_stride = sizeof(PageParams);
    q_ = device_array<float>(static_cast<std::size_t>(seqs_) * kQueryHeads * kDim);
    q16_ = device_array<std::byte>(static_cast<std::size_t>(seqs_) * kQueryHeads * kDim * 2);
    out_ = device_array<float>(static_cast<std::size_t>(seqs_) * kQueryHeads * kDim);
    out16_ = device_array<std::byte>(static_cast<std::size_t>(seqs_) * kQueryHeads * kDim * 2);
    make_tables();
    fill();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() {
    for (void* p :
         {static_cast<void*>(k_), static_cast<void*>(v_), static_cast<void*>(index_.summaries),
          static_cast<void*>(index_.estimates), static_cast<void*>(index_.value_means),
          static_cast<void*>(index_.params), static_cast<void*>(q_), static_cast<void*>(q16_),
          static_cast<void*>(out_), static_cast<void*>(out16_), static_cast<void*>(table_),
          static_cast<void*>(lens_), static_cast<void*>(p_)}) {
      cudaFree(p);
    }
  }

  [[nodiscard]] int seqs() const { return seqs_; }
  [[nodiscard]] std::size_t plane_bytes() const {
    return static_cast<std::size_t>(pages_) * 16 * kv_heads_ * kDim * 2;
  }
  [[nodiscard]] const void* keys() const { return k_; }

  PagedKvView view() const {
    PagedKvView kv;
    kv.dtype = DType::kBf16;
    kv.num_seqs = seqs_;
    kv.num_kv_heads = kv_heads_;
    kv.head_dim = kDim;
    kv.page_size = 16;
    kv.k = {k_, 16 * kDim, 16 * kDim * pages_, kDim};
    kv.v = {v_, 16 * kDim, 16 * kDim * pages_, kDim};
    kv.block_table = table_;
    kv.block_table_stride = ctx_ / 16;
    kv.seq_lens = lens_;
    return kv;
  }

  /// The step on sequences [first, first + batch).
  SparseStepParams step(const Config& c, int first) const {
    SparseStepParams p;
    PagedKvView kv = view();
    kv.num_seqs = c.batch;
    kv.block_table += static_cast<std::int64_t>(first) * kv.block_table_stride;
    kv.seq_lens += first;
    const SeqSubset all{nullptr, c.batch};
    const QueryView q{q_ + static_cast<std::int64_t>(first) * kQueryHeads * kDim,
                      kQueryHeads * kDim, kQueryHeads};
    const float scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    const std::int64_t unit = static_cast<std::int64_t>(first) * kv_heads_;
    const std::int64_t head = static_cast<std::int64_t>(first) * kQueryHeads;
    p.prune.score.seqs = all;
    p.prune.score.q = q;
    p.prune.score.kv = kv;
    p.prune.score.index = index_;
    p.prune.score.scale = scale;
    p.prune.score.page_stride = ctx_ / 16;
    SelectPagesParams& s = p.prune.select;
    s.seqs = all;
    s.kv = kv;
    s.mode = SelectMode::kByScore;
    s.forced = {16, 3};
    s.fraction = c.fraction;
    s.min_tokens = 1024;
    s.max_tokens = c.paper() ? 8192 : 1 << 30;
    s.candidate_stride = candidate_stride(c);
    s.pages = pages_out_ + unit * s.candidate_stride;
    s.page_counts = page_counts_ + unit;
    p.prune.estimate.index = index_;
    PruneParams& r = p.prune.prune;
    r.seqs = all;
    r.kv = kv;
    r.num_q_heads = kQueryHeads;
    r.criterion = c.paper() ? PruneCriterion::kPerHead : PruneCriterion::kGroupMean;
    r.forced = s.forced;
    r.min_tokens = 64;
    r.candidate_stride = s.candidate_stride;
    r.kept_stride = s.candidate_stride * 16;
    r.kept = kept_ + unit * r.kept_stride;
    r.kept_counts = kept_counts_ + unit;
    r.head_counts = head_counts_ + head;
    r.head_mass = head_mass_ + head;
    if (!c.paper()) {
      r.tail_mass = tail_mass_ + head * s.candidate_stride;
      r.tail_shift = tail_shift_ + head;
    }
    AttendSparseParams& a = p.attend;
    a.seqs = all;
    a.q = q;
    a.kv = kv;
    a.scale = scale;
    a.tail.mass = r.tail_mass;
    a.tail.index = index_;
    a.out = out_ + head * kDim;
    a.out_seq_stride = kQueryHeads * kDim;
    return p;
  }

  void make_lists(const Config& c) {
    const auto units = static_cast<std::size_t>(seqs_) * static_cast<std::size_t>(kv_heads_);
    const auto heads = static_cast<std::size_t>(seqs_) * kQueryHeads;
    const auto stride = static_cast<std::size_t>(candidate_stride(c));
    pages_out_ = device_array<std::int32_t>(units * stride);
    page_counts_ = device_array<std::int32_t>(units);
    kept_ = device_array<std::int32_t>(units * stride * 16);
    kept_counts_ = device_array<std::int32_t>(units);
    head_counts_ = device_array<std::int32_t>(heads);
    head_mass_ = device_array<float>(heads);
    tail_mass_ = device_array<float>(heads * stride);
    tail_shift_ = device_array<float>(heads);
    std::vector<float> p(heads, c.top_p());
    p_ = device_array<float>(heads);
    check(cudaMemcpy(p_, p.data(), heads * 4, cudaMemcpyHostToDevice), "p");
  }
  void free_lists() {
    for (void* p : {static_cast<void*>(pages_out_), static_cast<void*>(page_counts_),
                    static_cast<void*>(kept_), static_cast<void*>(kept_counts_),
                    static_cast<void*>(head_counts_), static_cast<void*>(head_mass_),
                    static_cast<void*>(tail_mass_), static_cast<void*>(tail_shift_),
                    static_cast<void*>(p_)}) {
      cudaFree(p);
    }
    p_ = nullptr;
  }
  [[nodiscard]] const float* p(int first) const {
    return p_ + static_cast<std::int64_t>(first) * kQueryHeads;
  }
  std::vector<std::int32_t> kept_counts(int count) const { return read(kept_counts_, count); }
  std::vector<std::int32_t> page_counts(int count) const { return read(page_counts_, count); }
  std::vector<std::int32_t> head_counts(int count) const { return read(head_counts_, count); }

  /// cuDNN over the same memory, taken as contiguous caches.
  Times dense(int batch) const {
    cuda::CudnnDecodeShape s;
    s.dtype = DType::kBf16;
    s.num_seqs = batch;
    s.num_q_heads = kQueryHeads;
    s.num_kv_heads = kv_heads_;
    s.head_dim = kDim;
    s.max_tokens = ctx_;
    s.outer_stride = static_cast<std::int64_t>(kv_heads_) * ctx_ * kDim;
    s.head_stride = static_cast<std::int64_t>(ctx_) * kDim;
    s.token_stride = kDim;
    std::string why;
    Times t;
    try {
      const auto plan = cuda::CudnnDecode::make(s, &why);
      if (plan == nullptr) {
        std::printf("  cuDNN: %s\n", why.c_str());
        return t;
      }
      auto* workspace = device_array<std::byte>(plan->workspace_bytes() + 256);
      const int groups = seqs_ / batch;
      t = time_graph(groups, [&](cudaStream_t stream) {
        for (int i = 0; i < groups; ++i) {
          const std::int64_t cache = i * batch * s.outer_stride * 2;
          const std::int64_t row = static_cast<std::int64_t>(i) * batch * kQueryHeads * kDim * 2;
          plan->run({q16_ + row, k_ + cache, v_ + cache, out16_ + row, nullptr, nullptr,
                     1.0F / std::sqrt(static_cast<float>(kDim)), workspace},
                    stream);
        }
      });
      cudaFree(workspace);
      std::printf("  cuDNN: %.1f us\n", t.median);
    } catch (const std::exception& e) {
      std::printf("  cuDNN: %s\n", e.what());
    }
    return t;
  }

 private:
  [[nodiscard]] std::int64_t candidate_stride(const Config& c) const {
    SelectPagesParams s;
    s.kv.page_size = 16;
    s.fraction = c.fraction;
    s.min_tokens = 1024;
    s.max_tokens = c.paper() ? 8192 : 1 << 30;
    return std::min<std::int64_t>(ctx_ / 16, std::max<std::int64_t>(s.budget_pages(ctx_), 5));
  }
  static std::vector<std::int32_t> read(const std::int32_t* from, int count) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(count));
    check(cudaMemcpy(out.data(), from, out.size() * 4, cudaMemcpyDeviceToHost), "counts");
    return out;
  }

  void make_tables() {
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages_));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(7));
    table_ = device_array<std::int32_t>(order.size());
    check(cudaMemcpy(table_, order.data(), order.size() * 4, cudaMemcpyHostToDevice), "table");
    const std::vector<std::int32_t> lens(static_cast<std::size_t>(seqs_), ctx_);
    lens_ = device_array<std::int32_t>(lens.size());
    check(cudaMemcpy(lens_, lens.data(), lens.size() * 4, cudaMemcpyHostToDevice), "lengths");
  }

  void fill() {
    bench::DataShape shape;
    shape.num_seqs = seqs_;
    shape.tokens = ctx_;
    shape.num_q_heads = kQueryHeads;
    shape.num_kv_heads = kv_heads_;
    shape.heavy_tokens = 900.0F * std::pow(static_cast<float>(ctx_) / 32768.0F, 0.7F);
    bench::make_data(shape, pages_, table_, k_, v_, q_, q16_);
    check(cudaDeviceSynchronize(), "data");
    std::vector<std::int32_t> pages(static_cast<std::size_t>(pages_));
    std::iota(pages.begin(), pages.end(), 0);
    auto* ids = device_array<std::int32_t>(pages.size());
    check(cudaMemcpy(ids, pages.data(), pages.size() * 4, cudaMemcpyHostToDevice), "pages");
    SealPagesParams seal;
    seal.kv = view();
    seal.index = index_;
    constexpr std::int64_t kRun = 1 << 15;
    for (std::int64_t at = 0; at < pages_; at += kRun) {
      seal.pages = ids + at;
      seal.num_pages = static_cast<std::int32_t>(std::min(kRun, pages_ - at));
      cuda::base::seal_pages(seal, nullptr);
    }
    check(cudaDeviceSynchronize(), "seal");
    cudaFree(ids);
  }

  int kv_heads_;
  int ctx_;
  int seqs_ = 0;
  std::int64_t pages_ = 0;
  IndexFormat format_;
  KeyIndexView index_;
  std::byte* k_ = nullptr;
  std::byte* v_ = nullptr;
  float* q_ = nullptr;
  std::byte* q16_ = nullptr;
  float* out_ = nullptr;
  std::byte* out16_ = nullptr;
  std::int32_t* table_ = nullptr;
  std::int32_t* lens_ = nullptr;
  float* p_ = nullptr;
  std::int32_t* pages_out_ = nullptr;
  std::int32_t* page_counts_ = nullptr;
  std::int32_t* kept_ = nullptr;
  std::int32_t* kept_counts_ = nullptr;
  std::int32_t* head_counts_ = nullptr;
  float* head_mass_ = nullptr;
  float* tail_mass_ = nullptr;
  float* tail_shift_ = nullptr;
};

}  // namespace twilight

#endif  // TWILIGHT_BENCH_CUDA_STEP_WORLD_H_
