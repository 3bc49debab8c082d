// Decode attention against the read bandwidth of the machine, measured in the same run.
//
//   attend_bench [threads [isa [repeats [head-major|page-major [all|sparse]]]]]
//
// head-major is the layout of KvCache, each head's pages in the order of the tokens; page-major is
// [page, head, slot, D] in shuffled physical pages, the worst a caller's own cache may look like.
// Every row gives the bytes of K and V the op must read, the median time, the spread (p10-p90), the
// rate at the median and its share of the plain read of the same number of threads.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/float16.h"
#include "core/thread_pool.h"
#include "ops/backend.h"
#include "timing.h"

namespace {

using twilight::Buffer;
using twilight::ThreadPool;
using twilight::bench::measure;
using twilight::bench::read_bandwidth;
using twilight::bench::Times;

struct Shape {
  int seqs;
  int q_heads;
  int kv_heads;
  int dim;
  int tokens;
  int page_size = 16;
};

struct Cache {
  Shape shape;
  Buffer k;
  Buffer v;
  std::vector<std::int32_t> table;
  std::vector<std::int32_t> lens;
  std::vector<float> q;
  std::vector<float> out;
  Buffer workspace;
  Buffer codes;   // value means, laid out like K and V
  Buffer params;  // scales
  twilight::PagedKvView view;
  twilight::KeyIndexView index;

  Cache(const Shape& s, const twilight::Backend& backend, bool head_major) : shape(s) {
    std::mt19937 rng(7);
    const int pages_per_seq = (s.tokens + s.page_size - 1) / s.page_size;
    const int pages = pages_per_seq * s.seqs;
    const std::size_t elements = std::size_t(pages) * s.kv_heads * s.page_size * s.dim;
    k = Buffer(elements * 2);
    v = Buffer(elements * 2);
    fill(k, &rng);
    fill(v, &rng);
    table.resize(pages);
    std::iota(table.begin(), table.end(), 0);
    if (!head_major) std::shuffle(table.begin(), table.end(), rng);
    lens.assign(s.seqs, s.tokens);
    std::normal_distribution<float> normal;
    q.resize(std::size_t(s.seqs) * s.q_heads * s.dim);
    for (float& x : q) x = normal(rng);
    out.resize(q.size());

    view.dtype = twilight::DType::kBf16;
    view.num_seqs = s.seqs;
    view.num_kv_heads = s.kv_heads;
    view.head_dim = s.dim;
    view.page_size = s.page_size;
    const std::int64_t row = s.dim;
    const std::int64_t page = s.page_size * row;
    const std::int64_t page_stride = head_major ? page : s.kv_heads * page;
    const std::int64_t head_stride = head_major ? pages * page : page;
    view.k = {k.data(), page_stride, head_stride, row};
    view.v = {v.data(), page_stride, head_stride, row};
    const std::int64_t record = s.dim / 2;
    codes = Buffer(std::size_t(pages) * s.kv_heads * record);
    params = Buffer(std::size_t(pages) * s.kv_heads * sizeof(twilight::PageParams));
    fill(codes, &rng);
    for (std::size_t i = 0; i < params.size() / sizeof(twilight::PageParams); ++i) {
      params.as<twilight::PageParams>()[i].value_scale = twilight::f32_to_f16(0.1F);
    }
    const auto lay_out = [&](std::int64_t bytes, std::int64_t& per_page, std::int64_t& per_head) {
      per_page = head_major ? bytes : s.kv_heads * bytes;
      per_head = head_major ? pages * bytes : bytes;
    };
    index.format.value_bits = 4;
    index.value_means = codes.data();
    lay_out(record, index.value_page_stride, index.value_head_stride);
    index.params = params.data();
    lay_out(sizeof(twilight::PageParams), index.params_page_stride, index.params_head_stride);
    view.block_table = table.data();
    view.block_table_stride = pages_per_seq;
    view.seq_lens = lens.data();

    twilight::StepCaps caps;
    caps.max_seqs = s.seqs;
    caps.num_q_heads = s.q_heads;
    caps.num_kv_heads = s.kv_heads;
    caps.head_dim = s.dim;
    caps.page_size = s.page_size;
    caps.max_tokens = s.tokens;
    caps.max_candidate_pages = pages_per_seq;
    workspace = Buffer(backend.workspace_bytes(caps));
  }

  static void fill(Buffer& buffer, std::mt19937* rng) {
    std::vector<std::uint16_t> block(1 << 16);
    std::normal_distribution<float> normal;
    for (auto& x : block) x = twilight::f32_to_bf16(normal(*rng));
    for (std::size_t at = 0; at < buffer.size(); at += block.size() * 2) {
      std::memcpy(buffer.data() + at, block.data(), std::min(block.size() * 2, buffer.size() - at));
    }
  }
  [[nodiscard]] twilight::Workspace scratch() { return {workspace.data(), workspace.size()}; }
  [[nodiscard]] twilight::QueryView query() const {
    return {q.data(), std::int64_t(shape.q_heads) * shape.dim, shape.q_heads};
  }
  [[nodiscard]] float scale() const { return 1.0F / std::sqrt(float(shape.dim)); }
};

class Bench {
 public:
  Bench(int threads, const std::string& isa, int repeats, bool head_major)
      : pool_(threads),
        backend_(twilight::make_cpu_backend(pool_, isa)),
        repeats_(repeats),
        head_major_(head_major) {
    std::printf("%s\n", backend_->description().c_str());
    const Buffer memory = touched(std::size_t{512} << 20);
    if (pool_.num_threads() != 1) {
      ThreadPool one(1);
      std::printf("plain read, 1 thread: %.1f GB/s\n", read_bandwidth(one, memory, 8));
    }
    bandwidth_ = read_bandwidth(pool_, memory, 12);
    std::printf("plain read, %d threads: %.1f GB/s (best of 12 passes over 512 MiB)\n",
                pool_.num_threads(), bandwidth_);
    std::printf("%-46s %9s %9s %17s %7s %6s %6s\n", "case", "MB", "median", "p10-p90 [us]", "GB/s",
                "share", "best");
  }

  void dense(const Shape& shape) {
    Cache cache = make_cache(shape);
    twilight::AttendDenseParams params;
    params.seqs.count = shape.seqs;
    params.q = cache.query();
    params.kv = cache.view;
    params.scale = cache.scale();
    params.out = cache.out.data();
    params.out_seq_stride = params.q.seq_stride;
    const double bytes = 4.0 * shape.seqs * shape.kv_heads * shape.tokens * shape.dim;
    report("dense " + text(shape), bytes,
           measure(repeats_, [&] { backend_->attend_dense(params, cache.scratch()); }));
  }

  // `count(list)` tokens of each (sequence, KV head): single tokens, or runs of 4 to 16 in a page.
  // `tail_pages` of the pages of each list add their mean values; 64 bytes of codes and 16 of
  // parameters each at D = 128.
  void sparse(const std::string& name, Cache& cache, const std::function<int()>& count,
              bool clustered, int tail_pages = 0) {
    const Shape& s = cache.shape;
    std::mt19937 rng(11);
    std::vector<std::int32_t> kept(std::size_t(s.seqs) * s.kv_heads * s.tokens);
    std::vector<std::int32_t> counts;
    double tokens = 0;
    for (int list = 0; list < s.seqs * s.kv_heads; ++list) {
      std::vector<bool> chosen(s.tokens);
      const int wanted = std::min(s.tokens, count());
      for (int have = 0; have < wanted;) {
        const int run = clustered ? 4 + int(rng() % 13) : 1;
        const int begin = clustered ? int(rng() % (s.tokens / 16)) * 16 : int(rng() % s.tokens);
        for (int i = 0; i < run && have < wanted; ++i) {
          if (!chosen[begin + i]) {
            chosen[begin + i] = true;
            ++have;
          }
        }
      }
      std::int32_t* to = kept.data() + std::size_t(list) * s.tokens;
      for (int t = 0; t < s.tokens; ++t) {
        if (chosen[t]) *to++ = t;
      }
      counts.push_back(wanted);
      tokens += wanted;
    }
    twilight::AttendSparseParams params;
    params.seqs.count = s.seqs;
    params.q = cache.query();
    params.kv = cache.view;
    params.scale = cache.scale();
    params.kept = kept.data();
    params.kept_counts = counts.data();
    params.kept_stride = s.tokens;
    params.out = cache.out.data();
    params.out_seq_stride = params.q.seq_stride;
    std::vector<float> mass(std::size_t(s.seqs) * s.q_heads * tail_pages);
    const std::vector<float> shift(std::size_t(s.seqs) * s.q_heads, 1.0F);
    std::vector<std::int32_t> pages(std::size_t(s.seqs) * s.kv_heads * tail_pages);
    const std::vector<std::int32_t> page_counts(std::size_t(s.seqs) * s.kv_heads, tail_pages);
    if (tail_pages > 0) {
      for (float& x : mass) x = float(rng() % 1000) * 1e-3F;
      const int step = s.tokens / s.page_size / tail_pages;
      for (std::size_t i = 0; i < pages.size(); ++i) {
        pages[i] = std::int32_t(i % std::size_t(tail_pages)) * step;
      }
      params.tail.mass = mass.data();
      params.tail.shift = shift.data();
      params.tail.pages = pages.data();
      params.tail.page_counts = page_counts.data();
      params.tail.candidate_stride = tail_pages;
      params.tail.index = cache.index;
    }
    // The rows and their part of the page tables must come from memory, so the caches are emptied
    // between runs by reading something else.
    std::vector<double> seconds;
    for (int i = 0; i < repeats_ + 1; ++i) {
      read_bandwidth(pool_, flush_, 1);
      const auto begin = std::chrono::steady_clock::now();
      backend_->attend_sparse(params, cache.scratch());
      const auto end = std::chrono::steady_clock::now();
      if (i > 0) seconds.push_back(std::chrono::duration<double>(end - begin).count());
    }
    std::sort(seconds.begin(), seconds.end());
    const std::size_t n = seconds.size();
    const double tail_bytes = double(tail_pages) * s.seqs * s.kv_heads * (s.dim / 2 + 16);
    report("sparse " + name, tokens * s.dim * 4 + tail_bytes,
           {seconds[n / 2], seconds[n / 10], seconds[n - 1 - n / 10], seconds[0]});
  }

  [[nodiscard]] Cache make_cache(const Shape& shape) {
    return Cache(shape, *backend_, head_major_);
  }

  static std::string text(const Shape& s) {
    return "B" + std::to_string(s.seqs) + " Hq" + std::to_string(s.q_heads) + " Hkv" +
           std::to_string(s.kv_heads) + " D" + std::to_string(s.dim) + " N" +
           std::to_string(s.tokens);
  }

 private:
  static Buffer touched(std::size_t bytes) {
    Buffer buffer(bytes);
    std::memset(buffer.data(), 1, bytes);
    return buffer;
  }

  void report(const std::string& name, double bytes, const Times& t) const {
    const double rate = bytes / t.median / 1e9;
    std::printf("%-46s %9.2f %9.1f %8.1f-%8.1f %7.1f %5.0f%% %6.1f\n", name.c_str(), bytes / 1e6,
                t.median * 1e6, t.low * 1e6, t.high * 1e6, rate, 100 * rate / bandwidth_,
                bytes / t.best / 1e9);
  }

  ThreadPool pool_;
  std::unique_ptr<twilight::Backend> backend_;
  int repeats_;
  bool head_major_;
  double bandwidth_ = 0;
  Buffer flush_ = touched(std::size_t{96} << 20);
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::string isa = argc > 2 ? argv[2] : "auto";
  const int repeats = argc > 3 ? std::atoi(argv[3]) : 30;
  const std::string layout = argc > 4 ? argv[4] : "head-major";
  if (layout != "head-major" && layout != "page-major") {
    std::fprintf(stderr, "[attend_bench] layout, got %s, accepted head-major, page-major\n",
                 layout.c_str());
    return 2;
  }
  Bench bench(threads, isa, repeats, layout == "head-major");
  if (argc <= 5 || std::strcmp(argv[5], "sparse") != 0) {
    bench.dense({1, 32, 8, 128, 512});  // 2 MiB: the arithmetic alone
    bench.dense({1, 32, 8, 128, 32768});
    bench.dense({8, 32, 8, 128, 32768});
    bench.dense({1, 32, 8, 64, 32768});
    bench.dense({1, 8, 8, 128, 32768});
    bench.dense({1, 64, 8, 128, 32768});
  }

  Cache one = bench.make_cache({1, 32, 8, 128, 32768});
  Cache eight = bench.make_cache({8, 32, 8, 128, 32768});
  std::mt19937 rng(3);
  std::lognormal_distribution<double> ragged(std::log(655.0), 1.0);
  const auto two_percent = [] { return 655; };
  const auto lognormal = [&] { return std::max(64, int(ragged(rng))); };
  const auto four_percent = [] { return 1310; };
  bench.sparse("4% random, B1", one, four_percent, false);
  bench.sparse("4% random, B8", eight, four_percent, false);
  bench.sparse(
      "no token, tail 512, B8", eight, [] { return 0; }, false, 512);
  bench.sparse("2% clustered, tail 512, B8", eight, two_percent, true, 512);
  bench.sparse("2% random, B1", one, two_percent, false);
  bench.sparse("2% clustered, B1", one, two_percent, true);
  bench.sparse("2% random, B8", eight, two_percent, false);
  bench.sparse("2% clustered, B8", eight, two_percent, true);
  bench.sparse("lognormal random, B8", eight, lognormal, false);
  bench.sparse("lognormal clustered, B8", eight, lognormal, true);
  return 0;
}
