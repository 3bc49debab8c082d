#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/elements.cuh"
#include "backend/cuda/device/records.cuh"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/rotate.cuh"

// estimate_scores_kernel: a warp takes a tile of 16 slots of a candidate page; lane t and lane
// t + 16 share slot t, each with every second run of 8 channels. Queries are in shared memory,
// plain and (2 bits) rotated. exact_scores_kernel: 8 lanes a token. Bound by instructions: codes
// are unpacked to f32. Tests: tests/cuda/index_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kHeadBlock = 8;  ///< query heads of a group at once
constexpr int kMaxBlocks = 64;

/// The query heads a block works on.
struct HeadBlock {
  int kv_head;
  int first;  ///< in the group
  int count;

  __device__ HeadBlock(int block, int group) {
    const int blocks = (group + kHeadBlock - 1) / kHeadBlock;
    kv_head = block / blocks;
    first = block % blocks * kHeadBlock;
    count = min(kHeadBlock, group - first);
  }
};

__device__ void load_queries(const QueryView& q, std::int64_t seq, std::int64_t first_head,
                             int count, int head_dim, float* out) {
  for (int i = threadIdx.x; i < count * head_dim; i += blockDim.x) {
    out[i] = q.data[seq * q.seq_stride + first_head * head_dim + i];
  }
}

/// Where the key of a slot comes from.
template <typename T>
struct KeySource {
  const T* row = nullptr;  ///< the key itself, or null
  const std::byte* tile = nullptr;
  const std::byte* centre = nullptr;
  float scale = 0;
  float zero = 0;
  float centre_step = 0;

  __device__ void get(const EstimateParams& params, int t, int d, bool aligned,
                      float (&x)[8]) const {
    if (row != nullptr) {
      Raw8<T> raw;
      raw.load(row + d, aligned);
      raw.get(x);
      return;
    }
    const IndexFormat& format = params.index.format;
    load_codes8(format.layout, format.key_bits, params.kv.head_dim, t, d, tile, x);
    if (format.key_bits == 2) {
      float mean[8];
      decode_nibbles8(centre, centre_step, d, mean);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = fmaf(scale, x[i] - 1.5F, mean[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = fmaf(scale, x[i], zero);
    }
  }
};

template <typename T>
__device__ KeySource<T> key_source(const EstimateParams& params, std::int64_t page, int head,
                                   int slot, bool from_keys) {
  KeySource<T> source;
  const PagedKvView& kv = params.kv;
  if (from_keys) {
    source.row = row_of<T>(kv, kv.k, page, head, slot);
    return source;
  }
  const IndexFormat& format = params.index.format;
  const int bits = format.key_bits;
  const int t = slot % kEstimateTileTokens;
  source.tile = params.index.estimate(page, head) +
                slot / kEstimateTileTokens * estimate_tile_bytes(bits, kv.head_dim);
  const std::byte* numbers = source.tile + estimate_code_bytes(bits, kv.head_dim);
  source.scale = load_f16(numbers + scale_place(format.layout, bits, t));
  if (bits != 2) {
    source.zero = load_f16(numbers + zero_place(format.layout, bits, t));
    return source;
  }
  const int i = slot / centroid_tokens(format.summary, kv.page_size);
  source.centre =
      params.index.centres(page, head, kv.page_size, kv.head_dim) + i * nibble_bytes(kv.head_dim);
  source.centre_step = f16_to_f32(page_params_of(params.index, page, head)->centre_scale[i]);
  return source;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    estimate_scores_kernel(const __grid_constant__ EstimateParams params,
                           const __grid_constant__ DeviceSubset seqs, bool aligned) {
  __shared__ float plain[kHeadBlock * kMaxHeadDim];
  __shared__ float rotated[kHeadBlock * kMaxHeadDim];
  const PagedKvView& kv = params.kv;
  const int head_dim = kv.head_dim;
  const int page_size = kv.page_size;
  const int group = params.q.num_heads / kv.num_kv_heads;
  const HeadBlock heads(blockIdx.y, group);
  const std::int64_t seq = seqs.at(blockIdx.z);
  const std::int64_t unit = seq * kv.num_kv_heads + heads.kv_head;
  const int tiles = estimate_tiles_per_page(page_size);
  const int work = params.page_counts[unit] * tiles;
  if (static_cast<int>(blockIdx.x) * kWarps >= work) return;
  const std::int64_t first_head = std::int64_t{heads.kv_head} * group + heads.first;
  load_queries(params.q, seq, first_head, heads.count, head_dim, plain);
  const bool rotates = !params.exact_keys && params.index.format.key_bits == 2;
  if (rotates) {
    load_queries(params.q, seq, first_head, heads.count, head_dim, rotated);
    __syncthreads();
    rotate_rows(rotated, heads.count, head_dim, head_dim);
  }
  __syncthreads();

  const int n = kv.seq_lens[seq];
  const int lane = threadIdx.x % 32;
  for (int item = blockIdx.x * kWarps + threadIdx.x / 32; item < work; item += gridDim.x * kWarps) {
    const int candidate = item / tiles;
    const int slot = item % tiles * kEstimateTileTokens + lane % 16;
    const int page_idx = params.pages[unit * params.candidate_stride + candidate];
    const bool from_keys = params.exact_keys || page_idx >= n / page_size;
    const bool exists = slot < page_size && page_idx * page_size + slot < n;
    float dot[kHeadBlock] = {};
    if (exists) {
      const std::int64_t page = kv.page_of(seq, page_idx);
      const auto source = key_source<T>(params, page, heads.kv_head, slot, from_keys);
      const float* q = from_keys || !rotates ? plain : rotated;
      for (int d = lane / 16 * 8; d < head_dim; d += 16) {
        float x[8];
        source.get(params, slot % kEstimateTileTokens, d, aligned, x);
#pragma unroll
        for (int h = 0; h < kHeadBlock; ++h) {
          if (h >= heads.count) break;
          const float* row = q + h * head_dim + d;
#pragma unroll
          for (int i = 0; i < 8; ++i) dot[h] = fmaf(row[i], x[i], dot[h]);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < kHeadBlock; ++h) {
      if (h >= heads.count) break;
      const float sum = dot[h] + __shfl_xor_sync(kFullMask, dot[h], 16);
      if (lane >= 16 || slot >= page_size) continue;
      params.estimates[(unit * group + heads.first + h) * params.estimate_stride +
                       std::int64_t{candidate} * page_size + slot] =
          exists ? sum * params.scale : -INFINITY;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    exact_scores_kernel(const __grid_constant__ ExactScoresParams params,
                        const __grid_constant__ DeviceSubset seqs, bool aligned) {
  constexpr int kLanes = 8;
  constexpr int kTokens = kThreads / kLanes;
  __shared__ float plain[kHeadBlock * kMaxHeadDim];
  const PagedKvView& kv = params.kv;
  const int head_dim = kv.head_dim;
  const int group = params.q.num_heads / kv.num_kv_heads;
  const HeadBlock heads(blockIdx.y, group);
  const std::int64_t seq = seqs.at(blockIdx.z);
  const int n = kv.seq_lens[seq];
  if (static_cast<int>(blockIdx.x) * kTokens >= n) return;
  const std::int64_t first_head = std::int64_t{heads.kv_head} * group + heads.first;
  load_queries(params.q, seq, first_head, heads.count, head_dim, plain);
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  for (int base = blockIdx.x * kTokens; base < n; base += gridDim.x * kTokens) {
    const int token = base + threadIdx.x / kLanes;
    float dot[kHeadBlock] = {};
    if (token < n) {
      const T* row = row_of<T>(kv, kv.k, kv.page_of(seq, token / kv.page_size), heads.kv_head,
                               token % kv.page_size);
      for (int d = lane * 8; d < head_dim; d += kLanes * 8) {
        Raw8<T> raw;
        raw.load(row + d, aligned);
        float x[8];
        raw.get(x);
#pragma unroll
        for (int h = 0; h < kHeadBlock; ++h) {
          if (h >= heads.count) break;
#pragma unroll
          for (int i = 0; i < 8; ++i) dot[h] = fmaf(plain[h * head_dim + d + i], x[i], dot[h]);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < kHeadBlock; ++h) {
      if (h >= heads.count) break;
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        dot[h] += __shfl_xor_sync(kFullMask, dot[h], step);
      }
      if (lane == 0 && token < n) {
        params.scores[(seq * params.q.num_heads + first_head + h) * params.token_stride + token] =
            dot[h] * params.scale;
      }
    }
  }
}

unsigned head_blocks(const PagedKvView& kv, const QueryView& q) {
  const int group = q.num_heads / kv.num_kv_heads;
  return static_cast<unsigned>(kv.num_kv_heads * ((group + kHeadBlock - 1) / kHeadBlock));
}

}  // namespace

void estimate_scores(const EstimateParams& params, const DeviceSubset& seqs, cudaStream_t stream) {
  if (seqs.count == 0) return;
  const PagedKvView& kv = params.kv;
  const std::int64_t items = params.candidate_stride * estimate_tiles_per_page(kv.page_size);
  const dim3 grid(blocks_for(items, kWarps, kMaxBlocks), head_blocks(kv, params.q),
                  static_cast<unsigned>(seqs.count));
  for_dtype(kv.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    estimate_scores_kernel<T>
        <<<grid, kThreads, 0, stream>>>(params, seqs, aligned_rows(kv.k, kv.dtype));
  });
  check_launch("estimate_scores");
}

void exact_scores(const ExactScoresParams& params, const DeviceSubset& seqs, cudaStream_t stream) {
  if (seqs.count == 0) return;
  const PagedKvView& kv = params.kv;
  const dim3 grid(blocks_for(params.token_stride, kThreads / 8, kMaxBlocks),
                  head_blocks(kv, params.q), static_cast<unsigned>(seqs.count));
  for_dtype(kv.dtype, [&](auto* type) {
    using T = std::remove_cvref_t<decltype(*type)>;
    exact_scores_kernel<T>
        <<<grid, kThreads, 0, stream>>>(params, seqs, aligned_rows(kv.k, kv.dtype));
  });
  check_launch("exact_scores");
}

}  // namespace twilight::cuda::base
