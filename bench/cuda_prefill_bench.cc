// Causal prefill attention on cuda:0: a chunk of 2,048 tokens behind a growing context, and whole
// prompts, over shuffled pages of 16 tokens; JSON on standard output. Pages of 24 tokens take the
// kernel on synchronous products, which is what other GPUs than Hopper's run.
//
// Usage: cuda_prefill_bench [SAMPLES]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "core/check.h"
#include "core/float16.h"
#include "cuda_timing.h"

namespace twilight::cuda {
namespace {

struct Shape {
  int num_tokens, before, num_q_heads, num_kv_heads, head_dim, page_size;
};

/// Normal numbers as T from f32, a block of 1 Mi of them over and over.
template <typename T, typename Convert>
DeviceBuffer normal_buffer(DeviceMemory& memory, std::int64_t count, const Convert& convert) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> block(std::size_t{1} << 20);
  for (T& x : block) x = convert(normal(random));
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  DeviceBuffer out(memory, bytes);
  for (std::size_t at = 0; at < bytes; at += block.size() * sizeof(T)) {
    memory.upload(out.data() + at, block.data(), std::min(bytes - at, block.size() * sizeof(T)));
  }
  return out;
}

void run_shape(CudaBackend& backend, const Shape& s, int samples, bool first) {
  DeviceMemory& memory = backend.memory();
  const std::int64_t tokens = std::int64_t{s.before} + s.num_tokens;
  const std::int64_t pages = (tokens + s.page_size - 1) / s.page_size;
  const std::int64_t page = std::int64_t{s.page_size} * s.head_dim;
  const std::int64_t rows = std::int64_t{s.num_tokens} * s.num_q_heads * s.head_dim;
  const auto bf16 = [](float x) { return f32_to_bf16(x); };
  const auto same = [](float x) { return x; };
  const DeviceBuffer k = normal_buffer<std::uint16_t>(memory, pages * page * s.num_kv_heads, bf16);
  const DeviceBuffer v = normal_buffer<std::uint16_t>(memory, pages * page * s.num_kv_heads, bf16);
  const DeviceBuffer q = normal_buffer<float>(memory, rows, same);
  const DeviceBuffer out(memory, static_cast<std::size_t>(rows) * 4);
  std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(3));
  const DeviceBuffer table_device(memory, table.size() * 4);
  memory.upload(table_device.data(), table.data(), table_device.size());
  const auto length = static_cast<std::int32_t>(tokens);
  const DeviceBuffer length_device(memory, 4);
  memory.upload(length_device.data(), &length, 4);

  AttendPrefillParams params;
  params.q = q.as<float>();
  params.q_token_stride = std::int64_t{s.num_q_heads} * s.head_dim;
  params.num_q_heads = s.num_q_heads;
  params.num_tokens = s.num_tokens;
  params.kv.dtype = DType::kBf16;
  params.kv.num_seqs = 1;
  params.kv.num_kv_heads = s.num_kv_heads;
  params.kv.head_dim = s.head_dim;
  params.kv.page_size = s.page_size;
  params.kv.k = {k.data(), page, pages * page, s.head_dim};
  params.kv.v = {v.data(), page, pages * page, s.head_dim};
  params.kv.block_table = table_device.as<std::int32_t>();
  params.kv.block_table_stride = pages;
  params.kv.seq_lens = length_device.as<std::int32_t>();
  params.kv.host_seq_lens = &length;
  params.scale = 0.088388F;
  params.out = out.as<float>();
  params.out_token_stride = params.q_token_stride;
  const LaunchTimes us =
      time_launches(backend.stream(), samples, [&] { backend.attend_prefill(params); });
  const double seen =
      static_cast<double>(s.num_tokens) * s.before + 0.5 * s.num_tokens * (s.num_tokens + 1.0);
  const double flops = 4.0 * seen * s.num_q_heads * s.head_dim;
  std::printf(
      "%s\n    {\"tokens\": %d, \"before\": %d, \"q_heads\": %d, \"kv_heads\": %d, \"head_dim\": "
      "%d, \"page_size\": %d, \"us\": %.1f, \"us_low\": %.1f, \"us_high\": %.1f, "
      "\"tflop_per_s\": %.0f}",
      first ? "" : ",", s.num_tokens, s.before, s.num_q_heads, s.num_kv_heads, s.head_dim,
      s.page_size, us.median, us.low, us.high, flops / us.median * 1e-6);
  std::fflush(stdout);
}

int run(int samples) {
  CudaBackend backend(0);
  std::printf("{\"device\": \"%s\", \"samples\": %d, \"runs\": [", backend.description().c_str(),
              samples);
  bool first = true;
  for (const Shape& shape :
       {Shape{2048, 0, 32, 8, 128, 16}, Shape{2048, 6144, 32, 8, 128, 16},
        Shape{2048, 14336, 32, 8, 128, 16}, Shape{2048, 30720, 32, 8, 128, 16},
        Shape{2048, 30720, 32, 8, 128, 24}, Shape{2048, 30720, 32, 32, 128, 16},
        Shape{2048, 30720, 32, 8, 64, 16}, Shape{2048, 129024, 32, 8, 128, 16},
        Shape{512, 30720, 32, 8, 128, 16}, Shape{8192, 0, 32, 8, 128, 16},
        Shape{32768, 0, 32, 8, 128, 16}, Shape{32768, 0, 32, 8, 128, 24}}) {
    run_shape(backend, shape, samples, first);
    first = false;
  }
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace twilight::cuda

int main(int argc, char** argv) {
  return twilight::cuda::run_benchmark(argc, argv, 15, twilight::cuda::run);
}
