#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/elements.cuh"
#include "backend/cuda/device/reduce.cuh"

// What a forward pass begins and ends with, and counts for statistics. embed_kernel: a block per
// token; rotation_kernel: a thread per angle; count_tail_kernel: a block per (sequence, KV head).
// Bound by latency. Tests: tests/cuda/model_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const __grid_constant__ EmbedParams params) {
  const std::int64_t cols = params.table.cols;
  const auto* row = params.table.data + params.tokens[blockIdx.x] * cols * sizeof(T);
  float* out = params.out + blockIdx.x * cols;
  for (std::int64_t i = threadIdx.x; i < cols; i += kThreads) {
    // The table may lie at any address.
    T value;
    auto* bytes = reinterpret_cast<unsigned char*>(&value);
    for (std::size_t b = 0; b < sizeof(T); ++b) {
      bytes[b] = reinterpret_cast<const unsigned char*>(row)[i * sizeof(T) + b];
    }
    out[i] = to_f32(value);
  }
}

__global__ void __launch_bounds__(kThreads)
    rotation_kernel(const __grid_constant__ RotationParams params) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= std::int64_t{params.num_tokens} * params.half) return;
  const double angle = params.positions[i / params.half] * params.frequencies[i % params.half];
  params.cos[i] = static_cast<float>(cos(angle));
  params.sin[i] = static_cast<float>(sin(angle));
}

__global__ void __launch_bounds__(kThreads)
    count_tail_kernel(const __grid_constant__ CountTailParams params, DeviceSubset seqs) {
  __shared__ int scratch[32];
  const PagedKvView& kv = params.kv;
  const TailParams& tail = params.tail;
  const std::int64_t seq = seqs.at(blockIdx.y);
  const std::int64_t unit = seq * kv.num_kv_heads + blockIdx.x;
  const std::int64_t group = params.num_q_heads / kv.num_kv_heads;
  const int candidates = tail.page_counts[unit];
  const std::int32_t* pages = tail.pages + unit * tail.candidate_stride;
  int count = 0;
  for (int i = threadIdx.x; i < candidates; i += kThreads) {
    bool any = false;
    for (std::int64_t head = unit * group; head < (unit + 1) * group; ++head) {
      any = any || tail.mass[head * tail.candidate_stride + i] > 0;
    }
    count += any ? 1 : 0;
  }
  if (tail.log_masses != nullptr) {
    const int sealed = kv.seq_lens[seq] / kv.page_size;
    const float lowest = logf(tail.far_floor / static_cast<float>(sealed));
    for (int page = threadIdx.x; page < sealed; page += kThreads) {
      if (!(tail.scores[unit * tail.page_stride + page] >= lowest)) continue;
      int low = 0;
      for (int high = candidates; low < high;) {
        const int middle = (low + high) / 2;
        if (pages[middle] < page) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      count += low < candidates && pages[low] == page ? 0 : 1;
    }
  }
  count = block_reduce(count, Sum<int>(), scratch);
  if (threadIdx.x == 0) params.counts[unit] = count;
}

}  // namespace

void embed(const EmbedParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  for_dtype(params.table.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    embed_kernel<T><<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  });
  check_launch("embed");
}

void rotation(const RotationParams& params, cudaStream_t stream) {
  const std::int64_t total = std::int64_t{params.num_tokens} * params.half;
  if (total == 0) return;
  rotation_kernel<<<static_cast<unsigned>((total + kThreads - 1) / kThreads), kThreads, 0,
                    stream>>>(params);
  check_launch("rotation");
}

void count_tail(const CountTailParams& params, const DeviceSubset& seqs, cudaStream_t stream) {
  if (seqs.count == 0) return;
  const dim3 grid(static_cast<unsigned>(params.kv.num_kv_heads), static_cast<unsigned>(seqs.count));
  count_tail_kernel<<<grid, kThreads, 0, stream>>>(params, seqs);
  check_launch("count_tail");
}

}  // namespace twilight::cuda::base
