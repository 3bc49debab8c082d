#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/records.cuh"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/rotate.cuh"
#include "core/float16.h"

// quest_scores_kernel, page_log_mass_kernel: a warp takes a page, its lanes share the channels; the
// group's queries are in shared memory. mass_scores_kernel: a block per (KV head, sequence) turns
// log masses into scores. Bound by instructions and latency. Tests: tests/cuda/index_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeadBlock = 8;
constexpr int kMaxBlocks = 64;

/// Four channels of the min and max vectors of a Quest record, d a multiple of 4.
__device__ void load_quest4(SummaryKind kind, int head_dim, const std::byte* record, int d,
                            float (&lo)[4], float (&hi)[4]) {
  if (kind == SummaryKind::kQuestBf16) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t low = load_word(record + 2 * d + 4 * i);
      const std::uint32_t high = load_word(record + 2 * (head_dim + d) + 4 * i);
      lo[2 * i] = __uint_as_float(low << 16);
      lo[2 * i + 1] = __uint_as_float(low & 0xffff0000U);
      hi[2 * i] = __uint_as_float(high << 16);
      hi[2 * i + 1] = __uint_as_float(high & 0xffff0000U);
    }
    return;
  }
  const int half = head_dim / 2;
  const int shift = d >= half ? 4 : 0;
  const int byte = d >= half ? d - half : d;
  const std::uint32_t low = load_word(record + byte) >> shift;
  const std::uint32_t high = load_word(record + half + byte) >> shift;
  const std::byte* numbers = record + head_dim;
  const float lo_scale = load_f16(numbers);
  const float lo_zero = load_f16(numbers + 2);
  const float hi_scale = load_f16(numbers + 4);
  const float hi_zero = load_f16(numbers + 6);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    lo[b] = fmaf(lo_scale, static_cast<float>(low >> (8 * b) & 15U), lo_zero);
    hi[b] = fmaf(hi_scale, static_cast<float>(high >> (8 * b) & 15U), hi_zero);
  }
}

__global__ void __launch_bounds__(kThreads)
    quest_scores_kernel(const __grid_constant__ ScorePagesParams params,
                        const __grid_constant__ DeviceSubset seqs) {
  extern __shared__ float queries[];  // [G, D]
  const PagedKvView& kv = params.kv;
  const int head_dim = kv.head_dim;
  const int group = params.q.num_heads / kv.num_kv_heads;
  const std::int64_t seq = seqs.at(blockIdx.z);
  const int head = blockIdx.y;
  const int pages = kv.sealed_pages(seq);
  if (static_cast<int>(blockIdx.x) * kWarps >= pages) return;
  const float* q =
      params.q.data + seq * params.q.seq_stride + std::int64_t{head} * group * head_dim;
  for (int i = threadIdx.x; i < group * head_dim; i += kThreads) queries[i] = q[i];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  float* scores = params.scores + (seq * kv.num_kv_heads + head) * params.page_stride;
  for (int page_idx = blockIdx.x * kWarps + threadIdx.x / 32; page_idx < pages;
       page_idx += gridDim.x * kWarps) {
    const std::byte* record = params.index.summary(kv.page_of(seq, page_idx), head);
    float best = -INFINITY;
    for (int first = 0; first < group; first += kHeadBlock) {
      float sum[kHeadBlock] = {};
      for (int d = lane * 4; d < head_dim; d += 128) {
        float lo[4];
        float hi[4];
        load_quest4(params.index.format.summary, head_dim, record, d, lo, hi);
#pragma unroll
        for (int h = 0; h < kHeadBlock; ++h) {
          if (first + h >= group) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float x = queries[(first + h) * head_dim + d + i];
            sum[h] += fmaxf(x * lo[i], x * hi[i]);
          }
        }
      }
#pragma unroll
      for (int h = 0; h < kHeadBlock; ++h) {
        if (first + h >= group) break;
        best = fmaxf(best, warp_reduce(sum[h], Sum<float>()));
      }
    }
    if (lane == 0) scores[page_idx] = best * params.scale;
  }
}

/// log(e^a + e^b).
__device__ float log_add(float a, float b) {
  const float top = fmaxf(a, b);
  return top + log1pf(expf(fminf(a, b) - top));
}

/// Writes log masses [B, Hq, stride] of sealed pages.
__global__ void __launch_bounds__(kThreads)
    page_log_mass_kernel(const __grid_constant__ ScorePagesParams params,
                         const __grid_constant__ DeviceSubset seqs, float* log_mass,
                         std::int64_t stride) {
  extern __shared__ float queries[];  // [G, D], rotated, then [G] variances per unit
  const PagedKvView& kv = params.kv;
  const int head_dim = kv.head_dim;
  const int group = params.q.num_heads / kv.num_kv_heads;
  const std::int64_t seq = seqs.at(blockIdx.z);
  const int head = blockIdx.y;
  const int pages = kv.sealed_pages(seq);
  if (static_cast<int>(blockIdx.x) * kWarps >= pages) return;
  const float* q =
      params.q.data + seq * params.q.seq_stride + std::int64_t{head} * group * head_dim;
  for (int i = threadIdx.x; i < group * head_dim; i += kThreads) queries[i] = q[i];
  __syncthreads();
  rotate_rows(queries, group, head_dim, head_dim);
  float* spreads = queries + group * head_dim;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const float scale = params.scale;
  for (int g = warp; g < group; g += kWarps) {
    float squares = 0;
    for (int d = lane; d < head_dim; d += 32) {
      squares = fmaf(queries[g * head_dim + d], queries[g * head_dim + d], squares);
    }
    squares = warp_reduce(squares, Sum<float>());
    if (lane == 0) spreads[g] = 0.5F * scale * scale * squares;
  }
  __syncthreads();

  const SummaryKind kind = params.index.format.summary;
  const int page_size = kv.page_size;
  const int run = centroid_tokens(kind, page_size);
  const bool runs = num_centroids(kind) > 1;
  const int means = runs ? (page_size + run - 1) / run : 1;
  const int vectors = runs ? means : 2;
  for (int page_idx = blockIdx.x * kWarps + warp; page_idx < pages;
       page_idx += gridDim.x * kWarps) {
    const std::int64_t page = kv.page_of(seq, page_idx);
    const std::byte* record = params.index.summary(page, head);
    const PageParams* numbers = page_params_of(params.index, page, head);
    // At most 256 channels: one run of 8 a lane.
    float x[kSubCentroids][8];
    for (int i = 0; i < kSubCentroids; ++i) {
      if (i >= vectors || lane * 8 >= head_dim) continue;
      decode_nibbles8(record + i * nibble_bytes(head_dim), f16_to_f32(numbers->centre_scale[i]),
                      lane * 8, x[i]);
    }
    const float variance = f16_to_f32(numbers->variance);
    for (int g = 0; g < group; ++g) {
      float dot[kSubCentroids];
#pragma unroll
      for (int i = 0; i < kSubCentroids; ++i) {
        dot[i] = 0;
        if (i >= vectors) continue;
        if (lane * 8 < head_dim) {
#pragma unroll
          for (int b = 0; b < 8; ++b) {
            dot[i] = fmaf(queries[g * head_dim + lane * 8 + b], x[i][b], dot[i]);
          }
        }
        dot[i] = scale * warp_reduce(dot[i], Sum<float>());
      }
      const float spread = spreads[g] * variance;
      float mass = 0;
      if (runs) {
        mass = -INFINITY;
        for (int i = 0; i < means; ++i) {
          const int covered = min(run, page_size - i * run);
          const float term = dot[i] + spread + logf(static_cast<float>(covered));
          mass = i == 0 ? term : log_add(mass, term);
        }
      } else {
        mass = dot[0] + dot[1];
        if (page_size > 1) {
          mass = log_add(mass, dot[0] + spread + logf(static_cast<float>(page_size - 1)));
        }
      }
      if (lane == 0)
        log_mass[((seq * kv.num_kv_heads + head) * group + g) * stride + page_idx] = mass;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    mass_scores_kernel(const __grid_constant__ ScorePagesParams params,
                       const __grid_constant__ DeviceSubset seqs, const float* log_mass,
                       std::int64_t stride) {
  extern __shared__ float norms[];  // [G]
  __shared__ float scratch[32];
  const PagedKvView& kv = params.kv;
  const int group = params.q.num_heads / kv.num_kv_heads;
  const std::int64_t seq = seqs.at(blockIdx.y);
  const std::int64_t unit = seq * kv.num_kv_heads + blockIdx.x;
  const int pages = kv.sealed_pages(seq);
  if (pages == 0) return;
  const float* rows = log_mass + unit * group * stride;
  for (int g = 0; g < group; ++g) {
    float top = -INFINITY;
    for (int i = threadIdx.x; i < pages; i += kThreads) top = fmaxf(top, rows[g * stride + i]);
    top = block_reduce(top, Max(), scratch);
    float sum = 0;
    for (int i = threadIdx.x; i < pages; i += kThreads) sum += expf(rows[g * stride + i] - top);
    sum = block_reduce(sum, Sum<float>(), scratch);
    if (threadIdx.x == 0) norms[g] = top + logf(sum);
  }
  __syncthreads();
  const float log_group = logf(static_cast<float>(group));
  float* scores = params.scores + unit * params.page_stride;
  for (int i = threadIdx.x; i < pages; i += kThreads) {
    float top = -INFINITY;
    for (int g = 0; g < group; ++g) top = fmaxf(top, rows[g * stride + i] - norms[g]);
    float sum = 0;
    for (int g = 0; g < group; ++g) sum += expf(rows[g * stride + i] - norms[g] - top);
    scores[i] = top + logf(sum) - log_group;
  }
}

}  // namespace

void score_pages(const ScorePagesParams& params, const DeviceSubset& seqs, Arena& arena,
                 cudaStream_t stream) {
  if (seqs.count == 0) return;
  const PagedKvView& kv = params.kv;
  const int group = params.q.num_heads / kv.num_kv_heads;
  const std::size_t query_bytes = static_cast<std::size_t>(group * kv.head_dim) * sizeof(float);
  const std::int64_t pages = std::min(params.page_stride, kv.block_table_stride);
  const dim3 grid(blocks_for(pages, kWarps, kMaxBlocks), static_cast<unsigned>(kv.num_kv_heads),
                  static_cast<unsigned>(seqs.count));
  if (num_centroids(params.index.format.summary) == 0) {
    quest_scores_kernel<<<grid, kThreads, query_bytes, stream>>>(params, seqs);
    check_launch("quest_scores");
    return;
  }
  float* log_mass = params.log_masses;
  std::int64_t stride = params.page_stride;
  if (log_mass == nullptr) {
    // A workspace for the caller's longest sequence may be for fewer pages than the strides allow.
    const std::int64_t rows = std::int64_t{kv.num_seqs} * params.q.num_heads;
    stride = std::min(pages, arena.free_bytes() / (rows * std::int64_t{sizeof(float)}));
    log_mass = arena.take<float>("log masses of pages", rows * stride);
  }
  // Whole vectors: the compiler reads up to four floats at once.
  const std::size_t group_bytes = align_up(static_cast<std::size_t>(group) * sizeof(float), 16);
  page_log_mass_kernel<<<grid, kThreads, query_bytes + group_bytes, stream>>>(params, seqs,
                                                                              log_mass, stride);
  check_launch("page_log_mass");
  mass_scores_kernel<<<dim3(grid.y, grid.z), kThreads, group_bytes, stream>>>(params, seqs,
                                                                              log_mass, stride);
  check_launch("mass_scores");
}

}  // namespace twilight::cuda::base
