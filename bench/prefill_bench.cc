// Causal attention of a chunk of prompt tokens beside the matrix peak of the same run.
//
//   prefill_bench [threads [isa [repeats]]]
//
// Hq 8, Hkv 2, D 128, P 16, bf16: the last 512 tokens of prompts of 4k to 32k, pages shuffled. The
// peak is the best rate of oneDNN's own matrix product over a few sizes, every thread on operands
// of its own. Only visible (query, key) pairs count: 4 D operations each and query head.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/dnnl_gemm.h"
#include "backend/cpu/prefill_attention.h"
#include "core/float16.h"
#include "core/thread_pool.h"

namespace {

using namespace twilight;

constexpr int kHeadsQ = 8;
constexpr int kHeadsKv = 2;
constexpr int kDim = 128;
constexpr int kPage = 16;
constexpr int kChunk = 512;

template <typename Fn>
std::vector<double> times_of(int repeats, const Fn& fn) {
  fn();
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    fn();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds;
}

// GFLOP/s of all threads together, best over sizes and repeats.
double matrix_peak(ThreadPool& pool, bool bf16, int repeats) {
  constexpr int kProducts = 8;  // per thread and timing
  double best = 0;
  for (const std::int32_t size : {256, 512, 1024}) {
    const cpu::GemmShape shape{size, size, size, bf16, true, false};
    const auto elements = static_cast<std::size_t>(size) * static_cast<std::size_t>(size);
    struct Worker {
      cpu::DnnlGemm gemm;
      std::vector<float> a, b, c;  // bf16 operands use half of a and b
    };
    std::vector<Worker> workers(static_cast<std::size_t>(pool.num_threads()));
    for (Worker& worker : workers) {
      worker.a.assign(elements, 0.01F);
      worker.b.assign(elements, 0.01F);
      worker.c.assign(elements, 0);
    }
    const auto seconds = times_of(repeats, [&] {
      pool.parallel_for(pool.num_threads(), [&](std::int64_t i, int) {
        Worker& worker = workers[static_cast<std::size_t>(i)];
        for (int k = 0; k < kProducts; ++k) {
          worker.gemm.run(shape, worker.a.data(), worker.b.data(), worker.c.data());
        }
      });
    });
    const double operations = 2.0 * size * size * size * kProducts * pool.num_threads();
    best = std::max(best, operations / seconds.front() * 1e-9);
  }
  return best;
}

void bench_attention(cpu::PrefillAttention& attention, int tokens, double peak, bool full_precision,
                     int repeats) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int pages = tokens / kPage;
  const std::int64_t page_stride = std::int64_t{kPage} * kDim;
  const std::int64_t head_stride = page_stride * pages;
  std::vector<std::uint16_t> keys(static_cast<std::size_t>(head_stride * kHeadsKv));
  std::vector<std::uint16_t> values(keys.size());
  for (auto& key : keys) key = f32_to_bf16(normal(random));
  for (auto& value : values) value = f32_to_bf16(normal(random));
  std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), random);
  std::vector<float> q(static_cast<std::size_t>(kChunk) * kHeadsQ * kDim);
  std::vector<float> out(q.size());
  for (float& value : q) value = normal(random);

  AttendPrefillParams params;
  params.q = q.data();
  params.q_token_stride = std::int64_t{kHeadsQ} * kDim;
  params.num_q_heads = kHeadsQ;
  params.num_tokens = kChunk;
  params.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
  params.out = out.data();
  params.out_token_stride = params.q_token_stride;
  params.full_precision = full_precision;
  params.kv.dtype = DType::kBf16;
  params.kv.num_seqs = 1;
  params.kv.num_kv_heads = kHeadsKv;
  params.kv.head_dim = kDim;
  params.kv.page_size = kPage;
  params.kv.k = {reinterpret_cast<std::byte*>(keys.data()), page_stride, head_stride, kDim};
  params.kv.v = {reinterpret_cast<std::byte*>(values.data()), page_stride, head_stride, kDim};
  params.kv.block_table = table.data();
  params.kv.block_table_stride = pages;
  params.kv.seq_lens = &tokens;

  const auto seconds = times_of(repeats, [&] { attention.run(params); });
  const double visible =
      static_cast<double>(kChunk) * (tokens - kChunk) + 0.5 * kChunk * (kChunk + 1);
  const double operations = 4.0 * kDim * visible * kHeadsQ;
  const double median = seconds[seconds.size() / 2];
  std::printf("%-5s N %6d  median %8.2f ms (%.2f to %.2f)  %6.1f GFLOP/s  %4.0f %% of peak\n",
              full_precision ? "f32" : "auto", tokens, median * 1e3, seconds.front() * 1e3,
              seconds.back() * 1e3, operations / median * 1e-9,
              operations / median * 1e-9 / peak * 100);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::string isa = argc > 2 ? argv[2] : "auto";
  const int repeats = argc > 3 ? std::max(1, std::atoi(argv[3])) : 9;
  ThreadPool pool(threads);
  const cpu::Isa chosen = cpu::parse_isa(isa);
  cpu::PrefillAttention attention(pool, chosen);
  for (const bool full_precision : {false, true}) {
    const bool bf16 = !full_precision && attention.uses_bf16();
    const double peak = matrix_peak(pool, bf16, repeats);
    std::printf("%s, %d threads: oneDNN matrix peak %.0f GFLOP/s in %s\n",
                std::string(cpu::isa_name(chosen)).c_str(), pool.num_threads(), peak,
                bf16 ? "bf16" : "f32");
    for (const int tokens : {4096, 8192, 16384, 32768}) {
      bench_attention(attention, tokens, peak, full_precision, repeats);
    }
  }
  return 0;
}
