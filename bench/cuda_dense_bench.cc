// Dense decode attention on cuda:0: the backend's own kernel against cuDNN in every form it takes,
// on distinct K and V for every sequence and head, JSON on standard output.
//
// Usage: cuda_dense_bench [SAMPLES]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cudnn_attention.h"
#include "core/check.h"
#include "core/float16.h"
#include "cuda_timing.h"

namespace twilight::cuda {
namespace {

struct Shape {
  int num_seqs, num_tokens, num_q_heads, num_kv_heads;
};

constexpr int kHeadDim = 128;

/// Numbers around 0 in bf16, the same 32 MiB over and over.
void fill(DeviceMemory& memory, const DeviceBuffer& buffer) {
  std::vector<std::uint16_t> block(std::size_t{16} << 20);
  std::uint32_t state = 12345;
  for (std::uint16_t& x : block) {
    state = state * 1664525U + 1013904223U;
    x = f32_to_bf16(static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31F);
  }
  for (std::size_t at = 0; at < buffer.size(); at += block.size() * 2) {
    memory.upload(buffer.data() + at, block.data(), std::min(buffer.size() - at, block.size() * 2));
  }
}

class Run {
 public:
  Run(CudaBackend& backend, const Shape& shape, int samples, bool first)
      : backend_(backend), s_(shape), samples_(samples), first_(first) {
    const std::int64_t rows = std::int64_t{s_.num_seqs} * s_.num_kv_heads * s_.num_tokens;
    DeviceMemory& memory = backend_.memory();
    k_ = DeviceBuffer(memory, static_cast<std::size_t>(rows * kHeadDim * 2));
    v_ = DeviceBuffer(memory, k_.size());
    const auto heads = static_cast<std::size_t>(s_.num_seqs * s_.num_q_heads * kHeadDim);
    q_ = DeviceBuffer(memory, heads * 2);
    q_f32_ = DeviceBuffer(memory, heads * 4);
    out_ = DeviceBuffer(memory, heads * 4);
    fill(memory, k_);
    fill(memory, v_);
    fill(memory, q_);
    fill(memory, q_f32_);
    memory.fill(q_f32_.data(), 0, q_f32_.size());
    lens_.assign(static_cast<std::size_t>(s_.num_seqs), s_.num_tokens);
    lens_device_ = DeviceBuffer(memory, lens_.size() * 4);
    memory.upload(lens_device_.data(), lens_.data(), lens_device_.size());
    bytes_ = 2.0 * static_cast<double>(k_.size());
  }

  void all() {
    print_own(16);
    print_cudnn(0, false);
    print_cudnn(0, true);
    print_cudnn(16, true);
    print_cudnn(64, true);
  }

 private:
  void print(const std::string& what, double us, const std::string& note = "") {
    std::printf(
        "%s\n    {\"batch\": %d, \"tokens\": %d, \"q_heads\": %d, \"kv_heads\": %d, "
        "\"kernel\": \"%s\", \"us\": %.1f, \"gb_per_s\": %.0f, \"note\": \"%s\"}",
        first_ ? "" : ",", s_.num_seqs, s_.num_tokens, s_.num_q_heads, s_.num_kv_heads,
        what.c_str(), us, us > 0 ? bytes_ / us * 1e-3 : 0.0, note.c_str());
    std::fflush(stdout);
    first_ = false;
  }

  /// Pages shuffled over the pool, [head][page][slot][D].
  std::vector<std::int32_t> shuffled_table(int page_size) const {
    const int pages = s_.num_seqs * (s_.num_tokens / page_size);
    std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
    for (int i = 0; i < pages; ++i) table[static_cast<std::size_t>(i)] = i;
    std::uint64_t state = 99;
    for (std::size_t i = table.size(); i > 1; --i) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      std::swap(table[i - 1], table[(state >> 33) % i]);
    }
    return table;
  }

  void print_own(int page_size) {
    DeviceMemory& memory = backend_.memory();
    const std::vector<std::int32_t> table = shuffled_table(page_size);
    const DeviceBuffer table_device(memory, table.size() * 4);
    memory.upload(table_device.data(), table.data(), table_device.size());
    const std::int64_t page = std::int64_t{page_size} * kHeadDim;
    AttendDenseParams params;
    params.seqs.count = s_.num_seqs;
    params.q = {q_f32_.as<float>(), std::int64_t{s_.num_q_heads} * kHeadDim, s_.num_q_heads};
    params.kv.dtype = DType::kBf16;
    params.kv.num_seqs = s_.num_seqs;
    params.kv.num_kv_heads = s_.num_kv_heads;
    params.kv.head_dim = kHeadDim;
    params.kv.page_size = page_size;
    params.kv.k = {k_.data(), page, std::ssize(table) * page, kHeadDim};
    params.kv.v = {v_.data(), page, std::ssize(table) * page, kHeadDim};
    params.kv.block_table = table_device.as<std::int32_t>();
    params.kv.block_table_stride = s_.num_tokens / page_size;
    params.kv.seq_lens = lens_device_.as<std::int32_t>();
    params.kv.host_seq_lens = lens_.data();
    params.scale = 0.088388F;
    params.out = out_.as<float>();
    params.out_seq_stride = params.q.seq_stride;
    StepCaps caps{.max_seqs = s_.num_seqs,
                  .num_q_heads = s_.num_q_heads,
                  .num_kv_heads = s_.num_kv_heads,
                  .head_dim = kHeadDim,
                  .page_size = page_size,
                  .max_tokens = s_.num_tokens,
                  .max_candidate_pages = 1};
    const DeviceBuffer workspace(memory, backend_.workspace_bytes(caps));
    const LaunchTimes us = time_launches(backend_.stream(), samples_, [&] {
      backend_.attend_dense(params, {workspace.data(), workspace.size()});
    });
    print("twilight attend_dense, pages of 16", us.median);
  }

  void print_cudnn(int page_size, bool has_lengths) {
    DeviceMemory& memory = backend_.memory();
    CudnnDecodeShape plan;
    plan.num_seqs = s_.num_seqs;
    plan.num_q_heads = s_.num_q_heads;
    plan.num_kv_heads = s_.num_kv_heads;
    plan.head_dim = kHeadDim;
    plan.max_tokens = s_.num_tokens;
    plan.has_lengths = has_lengths;
    plan.page_size = page_size;
    plan.token_stride = kHeadDim;
    DeviceBuffer table_device;
    if (page_size > 0) {
      const std::vector<std::int32_t> table = shuffled_table(page_size);
      table_device = DeviceBuffer(memory, table.size() * 4);
      memory.upload(table_device.data(), table.data(), table_device.size());
      plan.num_pages = std::ssize(table);
      plan.head_stride = std::int64_t{page_size} * kHeadDim;
      plan.outer_stride = plan.head_stride * s_.num_kv_heads;
    } else {
      plan.head_stride = std::int64_t{s_.num_tokens} * kHeadDim;
      plan.outer_stride = plan.head_stride * s_.num_kv_heads;
    }
    const std::string what = page_size > 0 ? cat("cuDNN, pages of ", page_size)
                             : has_lengths ? std::string("cuDNN, lengths")
                                           : std::string("cuDNN, contiguous");
    std::string why;
    const auto decode = CudnnDecode::make(plan, &why);
    if (decode == nullptr) {
      std::replace(why.begin(), why.end(), '"', '\'');
      std::replace(why.begin(), why.end(), '\n', ' ');
      print(what, 0, why);
      return;
    }
    const DeviceBuffer workspace(memory, decode->workspace_bytes());
    const CudnnDecodeArgs args{.q = q_.data(),
                               .k = k_.data(),
                               .v = v_.data(),
                               .out = out_.data(),
                               .table = table_device.as<std::int32_t>(),
                               .seq_lens = lens_device_.as<std::int32_t>(),
                               .scale = 0.088388F,
                               .workspace = workspace.data()};
    print(what, time_launches(backend_.stream(), samples_, [&] {
                  decode->run(args, backend_.stream());
                }).median);
  }

  CudaBackend& backend_;
  Shape s_;
  int samples_;
  bool first_;
  DeviceBuffer k_, v_, q_, q_f32_, out_, lens_device_;
  std::vector<std::int32_t> lens_;
  double bytes_ = 0;
};

}  // namespace

int run(int samples) {
  CudaBackend backend(0);
  std::string version;
  static_cast<void>(CudnnDecode::available(&version));
  std::printf("{\"device\": \"%s\", \"cudnn\": \"%s\", \"samples\": %d, \"runs\": [",
              backend.description().c_str(), version.c_str(), samples);
  bool first = true;
  for (const Shape& shape :
       {Shape{64, 32768, 32, 8}, Shape{16, 32768, 32, 32}, Shape{16, 32768, 32, 8},
        Shape{1, 32768, 32, 8}, Shape{1, 131072, 32, 8}, Shape{16, 4096, 32, 8}}) {
    Run(backend, shape, samples, first).all();
    first = false;
  }
  std::printf("\n]}\n");
  return 0;
}

}  // namespace twilight::cuda

int main(int argc, char** argv) {
  return twilight::cuda::run_benchmark(argc, argv, 15, twilight::cuda::run);
}
