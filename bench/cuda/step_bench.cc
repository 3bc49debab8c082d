#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cudnn_attention.h"
#include "backend/cuda/fast/fast_step.h"
#include "bench_data.h"

/// Times the fused CUDA decode step against cuDNN on the same memory: distinct caches for every
/// sequence and head, random page tables, cold L2 (batches walk through all sequences of the pool
/// inside one graph). Usage: step_bench OUT.json [--config heads:batch:ctx:preset:fraction[:p]]...
/// [--shape threads:cluster] [--no-baseline] [--stages]. Without --config runs the whole table.
/// Presets: adaptive (kSubCentroid, p 0.85), halves and centroid (the same with kHalfCentroid,
/// kCentroid), paper (p 0.95).
namespace twilight {
namespace {

void check(cudaError_t error, const char* what) {
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
Times time_graph(int steps, const std::function<void(cudaStream_t)>& body) {
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

std::string text(const char* format, auto... args) {
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
         format_.has_params() ? 16 : 0);
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

double percentile(std::vector<std::int32_t> x, double at) {
  std::sort(x.begin(), x.end());
  return x[static_cast<std::size_t>(at * double(x.size() - 1))];
}

struct Bench {
  std::vector<cuda_fast::StepShape> shapes = {{0, 0}};
  bool baseline = true;
  bool stages = false;
  double peak = 0;
  std::vector<std::string> rows;
  std::map<std::string, Times> dense;

  void run(World& world, const Config& c) {
    const int groups = world.seqs() / c.batch;
    if (groups < 1) return;
    world.make_lists(c);
    Times dense_time;
    const std::string key = text("%d:%d:%d", c.kv_heads, c.batch, c.ctx);
    if (baseline) {
      if (dense.count(key) == 0) dense[key] = world.dense(c.batch);
      dense_time = dense[key];
    }
    for (const auto& shape : shapes) {
      for (const bool lists : {true, false}) {
        cuda_fast::StepOptions options;
        options.shape = shape;
        options.write_lists = lists;
        const SparseStepParams probe = world.step(c, 0);
        const Support support = cuda_fast::fast_step_supports(probe, 0, options);
        if (!support) {
          std::printf("%d/%d heads B %d ctx %d: %s\n", 32, c.kv_heads, c.batch, c.ctx,
                      support.reason.c_str());
          continue;
        }
        const Times t = time_graph(groups, [&](cudaStream_t stream) {
          for (int i = 0; i < groups; ++i) {
            cuda_fast::launch_fast_step(world.step(c, i * c.batch), {nullptr, 0, c.batch},
                                        {world.p(i * c.batch), 0.0F}, 0, stream, options);
          }
        });
        report(world, c, shape, lists, t, dense_time);
      }
      if (stages) report_stages(world, c, shape);
    }
    world.free_lists();
  }

  void report(const World& world, const Config& c, cuda_fast::StepShape shape, bool lists,
              const Times& t, const Times& dense_time) {
    static std::vector<std::int32_t> kept;
    static std::vector<std::int32_t> pages;
    static std::vector<std::int32_t> own;
    if (lists) {
      const int used = world.seqs() / c.batch * c.batch;
      kept = world.kept_counts(used * c.kv_heads);
      pages = world.page_counts(used * c.kv_heads);
      own = world.head_counts(used * 32);
    }
    double kept_mean = 0;
    double page_mean = 0;
    for (const auto x : kept) kept_mean += x;
    for (const auto x : pages) page_mean += x;
    kept_mean /= double(kept.size());
    page_mean /= double(pages.size());
    const double problems = double(c.batch) * c.kv_heads;
    // Summaries with their parameters; records, and what the tail reads; kept rows. Four means of
    // a candidate are read twice.
    const bool four = c.preset == Preset::kAdaptive;
    const double page_bytes = c.paper() ? 1088 : 544 + 66 + (four ? 272 : 0);
    const double bytes = problems * (c.ctx / 16 *
                                         (c.paper() ? 512.0
                                          : four    ? 272.0
                                                    : 144.0) +
                                     page_mean * page_bytes + kept_mean * 512);
    const double rate = bytes / t.median * 1e-6;
    std::printf(
        "32/%-2d B %2d ctx %6d %-8s %.3f p %.2f shape %d:%d%s | %7.1f us (%.1f-%.1f) | %6.1f MB "
        "%.2f TB/s "
        "%2.0f%% | kept %.0f (p5 %.0f p50 %.0f p95 %.0f max %.0f) | dense %.1f x%.2f\n",
        c.kv_heads, c.batch, c.ctx, c.name(), c.fraction, double{c.top_p()}, shape.threads,
        shape.cluster, lists ? "" : " no lists", t.median, t.low, t.high, bytes * 1e-6, rate,
        100 * rate / peak, kept_mean, percentile(kept, 0.05), percentile(kept, 0.5),
        percentile(kept, 0.95), percentile(kept, 1.0), dense_time.median,
        dense_time.median / t.median);
    rows.push_back(
        text("{\"q_heads\": 32, \"kv_heads\": %d, \"batch\": %d, \"ctx\": %d, \"preset\": \"%s\", "
             "\"fraction\": %.4f, \"p\": %.2f, \"threads\": %d, \"cluster\": %d, \"lists\": %s, "
             "\"us\": %.2f, "
             "\"us_low\": %.2f, \"us_high\": %.2f, ",
             c.kv_heads, c.batch, c.ctx, c.name(), c.fraction, double{c.top_p()}, shape.threads,
             shape.cluster, lists ? "true" : "false", t.median, t.low, t.high) +
        text("\"bytes\": %.0f, \"tb_s\": %.3f, \"share_of_peak\": %.3f, \"candidate_pages\": %.1f, "
             "\"kept\": %.1f, \"kept_p5\": %.0f, \"kept_p50\": %.0f, \"kept_p95\": %.0f, "
             "\"kept_max\": %.0f, ",
             bytes, rate, rate / peak, page_mean, kept_mean, percentile(kept, 0.05),
             percentile(kept, 0.5), percentile(kept, 0.95), percentile(kept, 1.0)) +
        text("\"head_kept_p50\": %.0f, \"cudnn_us\": %.2f, "
             "\"speedup\": %.3f}",
             percentile(own, 0.5), dense_time.median, dense_time.median / t.median));
    std::fflush(stdout);
  }

  void report_stages(World& world, const Config& c, cuda_fast::StepShape shape) {
    const int problems = c.batch * c.kv_heads;
    auto* stamps =
        device_array<std::int64_t>(static_cast<std::size_t>(problems * cuda_fast::kStamps));
    cuda_fast::StepOptions options;
    options.shape = shape;
    options.stamps = stamps;
    const int groups = world.seqs() / c.batch;
    for (int i = 0; i < 3; ++i) {
      cuda_fast::launch_fast_step(world.step(c, i % groups * c.batch), {nullptr, 0, c.batch},
                                  {world.p(i % groups * c.batch), 0.0F}, 0, nullptr, options);
    }
    std::vector<std::int64_t> t(static_cast<std::size_t>(problems * cuda_fast::kStamps));
    check(cudaDeviceSynchronize(), "stages");
    check(cudaMemcpy(t.data(), stamps, t.size() * 8, cudaMemcpyDeviceToHost), "stamps");
    cudaFree(stamps);
    static const char* const kNames[] = {"query", "score", "keys", "select", "estimate",
                                         "prune", "QK",    "PV",   "tail",   "output"};
    std::int64_t first = t[0];
    std::int64_t last = 0;
    double mean[10] = {};
    double worst[10] = {};
    double start[2] = {0, 0};
    for (int i = 0; i < problems; ++i) {
      const std::int64_t* s = &t[static_cast<std::size_t>(i * cuda_fast::kStamps)];
      first = std::min(first, s[0]);
      last = std::max(last, s[10]);
      for (int k = 0; k < 10; ++k) {
        mean[k] += 1e-3 * double(s[k + 1] - s[k]) / problems;
        worst[k] = std::max(worst[k], 1e-3 * double(s[k + 1] - s[k]));
      }
    }
    for (int i = 0; i < problems; ++i) {
      const std::int64_t* s = &t[static_cast<std::size_t>(i * cuda_fast::kStamps)];
      start[0] = std::max(start[0], 1e-3 * double(s[0] - first));
      start[1] += 1e-3 * double(last - s[10]) / problems;
    }
    std::string json = "{\"stages_of\": \"" +
                       text("%d:%d:%d:%s:%.3f:%d:%d", c.kv_heads, c.batch, c.ctx, c.name(),
                            c.fraction, shape.threads, shape.cluster) +
                       "\"";
    std::printf("    stages (mean/max us):");
    for (int k = 0; k < 10; ++k) {
      std::printf(" %s %.1f/%.1f", kNames[k], mean[k], worst[k]);
      json += text(", \"%s\": %.2f", kNames[k], mean[k]);
    }
    double inner[6] = {};
    for (int i = 0; i < problems; ++i) {
      const std::int64_t* at = &t[static_cast<std::size_t>(i * cuda_fast::kStamps)];
      const std::int64_t marks[7] = {at[5], at[11], at[12], at[13], at[14], at[15], at[6]};
      for (int k = 0; k < 6; ++k) inner[k] += 1e-3 * double(marks[k + 1] - marks[k]) / problems;
    }
    std::printf(" | prune: weigh %.1f boundary %.1f list %.1f exact %.1f masks %.1f rows %.1f",
                inner[0], inner[1], inner[2], inner[3], inner[4], inner[5]);
    std::printf(" | span %.1f, last start %.1f, mean idle at the end %.1f\n",
                1e-3 * double(last - first), start[0], start[1]);
    rows.push_back(json + text(", \"span\": %.2f}", 1e-3 * double(last - first)));
  }
};

}  // namespace
}  // namespace twilight

int main(int argc, char** argv) {
  using namespace twilight;
  if (argc < 2) {
    std::fprintf(stderr, "usage: step_bench OUT.json [options]\n");
    return 2;
  }
  Bench bench;
  std::vector<Config> configs;
  for (int i = 2; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
    if (arg == "--no-baseline")
      bench.baseline = false;
    else if (arg == "--stages")
      bench.stages = true;
    else if (arg == "--shape") {
      cuda_fast::StepShape shape;
      std::sscanf(value(), "%d:%d", &shape.threads, &shape.cluster);
      bench.shapes.push_back(shape);
    } else if (arg == "--config") {
      Config c;
      char preset[32] = "";
      std::sscanf(value(), "%d:%d:%d:%31[a-z]:%lf:%lf", &c.kv_heads, &c.batch, &c.ctx, preset,
                  &c.fraction, &c.p);
      const auto* const at = std::ranges::find(kPresetNames, std::string_view(preset));
      if (at == std::end(kPresetNames)) {
        std::fprintf(stderr, "preset, got %s, accepted adaptive, halves, centroid, paper\n",
                     preset);
        return 2;
      }
      c.preset = static_cast<Preset>(at - kPresetNames);
      configs.push_back(c);
    }
  }
  if (configs.empty()) {
    for (const int heads : {8, 32}) {
      for (const Preset preset : {Preset::kAdaptive, Preset::kPaper}) {
        for (const int ctx : {4096, 10240, 32768, 131072}) {
          for (const int batch : {1, 4, 16, 64}) {
            if (std::int64_t{batch} * ctx * heads > std::int64_t{64} * 32768 * 8) continue;
            configs.push_back({heads, batch, ctx, preset, 0.25});
            if (preset == Preset::kAdaptive) {
              configs.push_back({heads, batch, ctx, preset, 0.125});
            }
          }
        }
      }
    }
  }
  cudaDeviceProp prop{};
  check(cudaGetDeviceProperties(&prop, 0), "device");
  std::string cudnn;
  const Support has_cudnn = cuda::CudnnDecode::available(&cudnn);
  std::printf("%s, cuDNN %s\n", prop.name, has_cudnn ? cudnn.c_str() : has_cudnn.reason.c_str());
  std::stable_sort(configs.begin(), configs.end(), [](const Config& a, const Config& b) {
    return std::tie(a.kv_heads, a.ctx, a.preset) < std::tie(b.kv_heads, b.ctx, b.preset);
  });
  std::unique_ptr<World> world;
  const Config* last = nullptr;
  double short_peak = 0;
  for (const Config& c : configs) {
    if (last == nullptr || last->kv_heads != c.kv_heads || last->ctx != c.ctx ||
        last->preset != c.preset) {
      world.reset();
      world = std::make_unique<World>(c.kv_heads, c.ctx, c.preset);
    }
    last = &c;
    if (bench.peak == 0) {
      auto* sink = device_array<std::byte>(256);
      const std::size_t bytes = std::size_t{2} << 30;
      for (const int blocks : {132 * 2, 132 * 4, 132 * 8, 132 * 16}) {
        const Times t = time_graph(1, [&](cudaStream_t stream) {
          bench::read_memory(world->keys(), bytes, sink, blocks, stream);
        });
        bench.peak = std::max(bench.peak, double(bytes) / t.median * 1e-6);
      }
      const std::size_t small = std::size_t{140} << 20;
      const Times t = time_graph(14, [&](cudaStream_t stream) {
        for (int i = 0; i < 14; ++i) {
          bench::read_memory(static_cast<const std::byte*>(world->keys()) + i * small, small, sink,
                             132 * 4, stream);
        }
      });
      short_peak = double(small) / t.median * 1e-6;
      std::printf("read peak %.3f TB/s (2 GiB), %.3f TB/s (launches of 140 MiB)\n", bench.peak,
                  short_peak);
      cudaFree(sink);
    }
    bench.run(*world, c);
  }
  std::ofstream out(argv[1]);
  out << "{\"device\": \"" << prop.name << "\", \"cudnn\": \"" << cudnn
      << "\", \"read_peak_tb_s\": " << bench.peak << ", \"read_peak_140mb_tb_s\": " << short_peak
      << ", \"rows\": [\n";
  for (std::size_t i = 0; i < bench.rows.size(); ++i) {
    out << bench.rows[i] << (i + 1 < bench.rows.size() ? ",\n" : "\n");
  }
  out << "]}\n";
  return 0;
}
