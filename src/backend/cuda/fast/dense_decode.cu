#include "backend/cuda/fast/dense_decode.h"

#include <algorithm>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/fast/dependent.cuh"
#include "backend/cuda/fast/device_ops.cuh"
#include "backend/cuda/fast/kv_rows.h"

// dense_kernel: a block of 4 warps takes a part of a (sequence, KV head), a warp every fourth tile
// of 16 tokens under its own online softmax. Lanes are 4 g + t. Scores: rows are query parts,
// columns tokens; a lane loads 16 bytes 64 i + 16 t of the keys of tokens g and 8 + g, which are
// its operand as they are. Queries are three 16-bit parts: with groups of up to 4, rows 4 k + h are
// part k of head h; else rows h and 8 + h are parts 0 and 1 of head h and a second product adds
// part 2. Values: rows are channels, columns heads; weights are two 16-bit parts: with groups of up
// to 4, columns h and 4 + h; else in two products. Partial results are merged by combine_kernel.
// Parts follow from the length and the number of KV heads, so a sequence gets the same bits in
// every batch. Bound by the bytes of K and V. Tests: tests/cuda/attend_cuda_test.cc.
namespace twilight::cuda_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;
constexpr int kLeastTokens = 256;   // of a part
constexpr int kBlocksWanted = 256;  // of one sequence
constexpr int kMostParts = 128;
constexpr int kCombineThreads = 128;

__host__ __device__ constexpr int most_parts(int num_kv_heads) {
  const int wanted = kBlocksWanted / num_kv_heads;
  return wanted < 16 ? 16 : wanted > kMostParts ? kMostParts : wanted;
}

/// Tiles of a part and parts of a sequence of n tokens.
struct Cut {
  int tiles;
  int parts;
};
__host__ __device__ constexpr Cut cut_of(int n, int num_kv_heads) {
  const int all = (n + kTile - 1) / kTile;
  const int most = most_parts(num_kv_heads);
  const int least = kLeastTokens / kTile;
  int tiles = (all + most - 1) / most;
  if (tiles < least) tiles = least;
  return {tiles, all == 0 ? 1 : (all + tiles - 1) / tiles};
}

/// Where a tile lies: a physical page and a slot in it.
struct Place {
  std::int32_t page = 0;
  std::int32_t slot = 0;
};

struct DenseArgs : KvRows {
  explicit DenseArgs(const PagedKvView& kv) : KvRows(kv) {}

  cuda::DeviceSubset seqs;
  const float* q = nullptr;
  std::int64_t q_seq_stride = 0;
  const std::int32_t* table = nullptr;
  std::int64_t table_stride = 0;
  const std::int32_t* lengths = nullptr;
  int num_kv_heads = 0;
  int group = 0;
  int tiles_per_page = 0;
  float scale_log2 = 0;
  float* out = nullptr;
  std::int64_t out_seq_stride = 0;
  float* partials = nullptr;  ///< [B, Hq, most_parts, D + 2]: maximum, sum, weighted values
};

template <typename E, int kDim, bool kWide>
__global__ void __launch_bounds__(kThreads, kWide ? 2 : 3)
    dense_kernel(const __grid_constant__ DenseArgs args) {
  constexpr int kChunks = kDim / 32;  // 64-byte pieces of a key
  constexpr int kHalves = kDim / 64;
  constexpr int kHeads = kWide ? 8 : 4;
  __shared__ float warp_out[kWarps][kHeads][kDim + 4];
  __shared__ float warp_max[kWarps][kHeads];
  __shared__ float warp_total[kWarps][kHeads];
  start_dependents();
  wait_for_inputs();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int kv_head = static_cast<int>(blockIdx.y);
  const std::int64_t seq = args.seqs.at(blockIdx.z);
  const int n = args.lengths[seq];
  const Cut cut = cut_of(n, args.num_kv_heads);
  const int part = static_cast<int>(blockIdx.x);
  if (part >= cut.parts) return;
  const int all = (n + kTile - 1) / kTile;
  const int first = part * cut.tiles;
  const int end = min(all, first + cut.tiles);

  // Query operands: [piece of 16 channels][register].
  std::uint32_t q[2 * kChunks][4];
  std::uint32_t q_low[kWide ? 2 * kChunks : 1][2];
  const auto query_pair = [&](int head, int channel, int query_part) {
    if (head >= args.group) return 0U;
    const float* at = args.q + seq * args.q_seq_stride +
                      (std::int64_t{kv_head} * args.group + head) * kDim + channel;
    float x[2] = {at[0] * args.scale_log2, at[1] * args.scale_log2};
    std::uint32_t pair = pack_pair<E>(x[0], x[1]);
    for (int k = 0; k < query_part; ++k) {
      const float2 taken = unpack_pair<E>(pair);
      x[0] -= taken.x;
      x[1] -= taken.y;
      pair = pack_pair<E>(x[0], x[1]);
    }
    return pair;
  };
#pragma unroll
  for (int i = 0; i < 2 * kChunks; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r % 2);
      const int channel = 32 * (i / 2) + 8 * t + 4 * (i % 2) + 2 * (r / 2);
      if constexpr (kWide) {
        q[i][r] = query_pair(g, channel, r % 2);
        if (r % 2 == 0) q_low[i][r / 2] = query_pair(g, channel, 2);
      } else {
        q[i][r] = row < 12 ? query_pair(row % 4, channel, row / 4) : 0U;
      }
    }
  }

  const std::uint8_t* const keys = args.k + kv_head * args.k_head_bytes;
  const std::uint8_t* const values = args.v + kv_head * args.v_head_bytes;
  const std::int32_t* const table = args.table + seq * args.table_stride;
  float sums[kHalves][4][4] = {};
  float top = -INFINITY;
  float total = 0;
  uint4 k[2][kChunks];
  uint4 v[kHalves][4];
  const auto place_of = [&](int tile) {
    if (args.tiles_per_page == 1) return Place{table[tile], 0};
    const int page = tile / args.tiles_per_page;
    return Place{table[page], (tile - page * args.tiles_per_page) * kTile};
  };
  const auto load_keys = [&](int tile, Place place) {
    const std::uint8_t* at =
        keys + place.page * args.k_page_bytes + (place.slot + g) * args.k_token_bytes + 16 * t;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool inside = tile < end && tile * kTile + 8 * j + g < n;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        k[j][i] = uint4{0, 0, 0, 0};
        if (inside) k[j][i] = load_stream16(at + 8 * j * args.k_token_bytes + 64 * i);
      }
    }
  };
  const auto load_values = [&](int tile, Place place) {
    const std::uint8_t* at =
        values + place.page * args.v_page_bytes + place.slot * args.v_token_bytes + 16 * g;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = 2 * t + r % 2 + 8 * (r / 2);
      const bool inside = tile < end && tile * kTile + token < n;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        v[half][r] = uint4{0, 0, 0, 0};
        if (inside) v[half][r] = load_stream16(at + token * args.v_token_bytes + 128 * half);
      }
    }
  };

  int tile = first + warp;
  const Place place = tile < end ? place_of(tile) : Place{};
  Place next_place = tile + kWarps < end ? place_of(tile + kWarps) : Place{};
  load_keys(tile, place);
  load_values(tile, place);
#pragma unroll 1
  for (; tile < end; tile += kWarps) {
    const int next = tile + kWarps;
    float score[2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const uint4 x = k[j][i];
        mma_16<E>(score[j], q[2 * i][0], q[2 * i][1], q[2 * i][2], q[2 * i][3], x.x, x.y);
        mma_16<E>(score[j], q[2 * i + 1][0], q[2 * i + 1][1], q[2 * i + 1][2], q[2 * i + 1][3], x.z,
                  x.w);
        if constexpr (kWide) {
          mma_16<E>(score[j], q_low[2 * i][0], 0, q_low[2 * i][1], 0, x.x, x.y);
          mma_16<E>(score[j], q_low[2 * i + 1][0], 0, q_low[2 * i + 1][1], 0, x.z, x.w);
        }
      }
    }
    load_keys(next, next_place);
    const Place after = next + kWarps < end ? place_of(next + kWarps) : Place{};
    float largest = -INFINITY;
    float weight[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float x = score[j][c] + score[j][2 + c];
        if constexpr (!kWide) x += __shfl_xor_sync(kFullMask, x, 16);
        weight[j][c] = tile * kTile + 8 * j + 2 * t + c < n ? x : -INFINITY;
        largest = fmaxf(largest, weight[j][c]);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
    if (__any_sync(kFullMask, largest > top)) {
      const float raised = fmaxf(top, largest);
      const float factor = raised == -INFINITY ? 1.0F : exp2_fast(top - raised);
      top = raised;
      total *= factor;
      const float left = __shfl_sync(kFullMask, factor, 8 * t);
      const float right = __shfl_sync(kFullMask, factor, 8 * t + 4);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[half][i][0] *= left;
          sums[half][i][1] *= right;
          sums[half][i][2] *= left;
          sums[half][i][3] *= right;
        }
      }
    }
    const float shift = top == -INFINITY ? 0.0F : top;
    std::uint32_t w[2];
    std::uint32_t w_low[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float left = exp2_fast(weight[j][0] - shift);
      const float right = exp2_fast(weight[j][1] - shift);
      total += left + right;
      w[j] = pack_pair<E>(left, right);
      const float2 taken = unpack_pair<E>(w[j]);
      w_low[j] = pack_pair<E>(left - taken.x, right - taken.y);
      if (!kWide && g >= 4) w[j] = w_low[j];
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const std::uint32_t x[4][4] = {{v[half][0].x, v[half][0].y, v[half][0].z, v[half][0].w},
                                     {v[half][1].x, v[half][1].y, v[half][1].z, v[half][1].w},
                                     {v[half][2].x, v[half][2].y, v[half][2].z, v[half][2].w},
                                     {v[half][3].x, v[half][3].y, v[half][3].z, v[half][3].w}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t a0 = __byte_perm(x[0][i], x[1][i], 0x5410);
        const std::uint32_t a1 = __byte_perm(x[0][i], x[1][i], 0x7632);
        const std::uint32_t a2 = __byte_perm(x[2][i], x[3][i], 0x5410);
        const std::uint32_t a3 = __byte_perm(x[2][i], x[3][i], 0x7632);
        mma_16<E>(sums[half][i], a0, a1, a2, a3, w[0], w[1]);
        if constexpr (kWide) mma_16<E>(sums[half][i], a0, a1, a2, a3, w_low[0], w_low[1]);
      }
    }
    load_values(next, next_place);
    next_place = after;
  }

  // Channel 64 half + 8 g + 2 i + r of column 2 t + c is sums[half][i][2 r + c].
  total += __shfl_xor_sync(kFullMask, total, 1);
  total += __shfl_xor_sync(kFullMask, total, 2);
  if (t == 0 && g < kHeads) {
    warp_max[warp][g] = top;
    warp_total[warp][g] = total;
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float x = sums[half][i][c];
        float y = sums[half][i][2 + c];
        if constexpr (!kWide) {
          x += __shfl_xor_sync(kFullMask, x, 2);
          y += __shfl_xor_sync(kFullMask, y, 2);
        }
        const int head = 2 * t + c;
        if (head >= kHeads) continue;
        *reinterpret_cast<float2*>(&warp_out[warp][head][64 * half + 8 * g + 2 * i]) = float2{x, y};
      }
    }
  }
  __syncthreads();
  const int heads_of_all = args.num_kv_heads * args.group;
  for (int i = static_cast<int>(threadIdx.x); i < args.group * kDim; i += kThreads) {
    const int head = i / kDim;
    const int d = i % kDim;
    float highest = warp_max[0][head];
#pragma unroll
    for (int x = 1; x < kWarps; ++x) highest = fmaxf(highest, warp_max[x][head]);
    const float shift = highest == -INFINITY ? 0.0F : highest;
    float value = 0;
    float sum = 0;
#pragma unroll
    for (int x = 0; x < kWarps; ++x) {
      const float factor = exp2_fast(warp_max[x][head] - shift);
      value = fmaf(factor, warp_out[x][head][d], value);
      sum = fmaf(factor, warp_total[x][head], sum);
    }
    const std::int64_t row = std::int64_t{kv_head} * args.group + head;
    if (cut.parts == 1) {
      args.out[seq * args.out_seq_stride + row * kDim + d] = sum == 0 ? 0.0F : value / sum;
      continue;
    }
    float* partial =
        args.partials +
        ((seq * heads_of_all + row) * most_parts(args.num_kv_heads) + part) * (kDim + 2);
    if (d == 0) {
      partial[0] = highest;
      partial[1] = sum;
    }
    partial[2 + d] = value;
  }
}

/// Merges the parts of a (query head, sequence) in their order; a thread a channel.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ DenseArgs args, int dim) {
  __shared__ float factors[kMostParts];
  __shared__ float totals[kMostParts];
  start_dependents();
  wait_for_inputs();
  const std::int64_t seq = args.seqs.at(blockIdx.y);
  const std::int64_t head = blockIdx.x;
  const int parts = cut_of(args.lengths[seq], args.num_kv_heads).parts;
  if (parts == 1) return;
  const std::int64_t stride = dim + 2;
  const float* from = args.partials + (seq * args.num_kv_heads * args.group + head) *
                                          most_parts(args.num_kv_heads) * stride;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < parts) {
    factors[thread] = from[thread * stride];
    totals[thread] = from[thread * stride + 1];
  }
  __syncthreads();
  float highest = factors[0];
  for (int i = 1; i < parts; ++i) highest = fmaxf(highest, factors[i]);
  const float shift = highest == -INFINITY ? 0.0F : highest;
  __syncthreads();
  if (thread < parts) factors[thread] = exp2_fast(factors[thread] - shift);
  __syncthreads();
  if (thread >= dim) return;
  float value = 0;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < parts; ++i) {
    value = fmaf(factors[i], from[i * stride + 2 + thread], value);
    sum = fmaf(factors[i], totals[i], sum);
  }
  args.out[seq * args.out_seq_stride + head * dim + thread] = sum == 0 ? 0.0F : value / sum;
}

template <typename E, int kDim>
cudaError_t launch_dense(const DenseArgs& args, dim3 grid, bool dependent, cudaStream_t stream) {
  const auto run = [&](auto* kernel) {
    return launch_dependent(kernel, grid, dim3(kThreads), 0, stream, dependent, args);
  };
  return args.group <= 4 ? run(dense_kernel<E, kDim, false>) : run(dense_kernel<E, kDim, true>);
}

bool aligned(const PagePlane& plane) {
  return reinterpret_cast<std::uintptr_t>(plane.data) % 16 == 0 && plane.page_stride % 8 == 0 &&
         plane.head_stride % 8 == 0 && plane.token_stride % 8 == 0;
}

}  // namespace

bool dense_decode_supports(const AttendDenseParams& params) {
  const PagedKvView& kv = params.kv;
  return (kv.head_dim == 64 || kv.head_dim == 128) && kv.dtype != DType::kF32 &&
         kv.page_size % kTile == 0 && params.q.num_heads / kv.num_kv_heads <= 8 && aligned(kv.k) &&
         aligned(kv.v);
}

std::int64_t dense_decode_floats(std::int64_t num_seqs, std::int64_t num_q_heads,
                                 std::int64_t num_kv_heads, std::int64_t head_dim) {
  return num_seqs * num_q_heads * most_parts(static_cast<int>(num_kv_heads)) * (head_dim + 2);
}

void dense_decode(const AttendDenseParams& params, const cuda::DeviceSubset& seqs, Arena& arena,
                  bool dependent, cudaStream_t stream) {
  if (seqs.count == 0) return;
  const PagedKvView& kv = params.kv;
  DenseArgs args(kv);
  args.seqs = seqs;
  args.q = params.q.data;
  args.q_seq_stride = params.q.seq_stride;
  args.table = kv.block_table;
  args.table_stride = kv.block_table_stride;
  args.lengths = kv.seq_lens;
  args.num_kv_heads = kv.num_kv_heads;
  args.group = params.q.num_heads / kv.num_kv_heads;
  args.tiles_per_page = kv.page_size / kTile;
  args.scale_log2 = params.scale * kLog2E;
  args.out = params.out;
  args.out_seq_stride = params.out_seq_stride;
  args.partials = arena.take<float>(
      "attention partials",
      dense_decode_floats(kv.num_seqs, params.q.num_heads, kv.num_kv_heads, kv.head_dim));
  const std::int64_t capacity = kv.block_table_stride * kv.page_size;
  const auto parts = static_cast<int>(std::clamp<std::int64_t>(
      (capacity + kLeastTokens - 1) / kLeastTokens, 1, most_parts(kv.num_kv_heads)));
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(kv.num_kv_heads),
                  static_cast<unsigned>(seqs.count));
  const bool bf16 = kv.dtype == DType::kBf16;
  const auto launch = kv.head_dim == 64
                          ? (bf16 ? launch_dense<Bf16, 64> : launch_dense<Half, 64>)
                          : (bf16 ? launch_dense<Bf16, 128> : launch_dense<Half, 128>);
  TWILIGHT_CUDA(launch(args, grid, dependent, stream));
  if (parts == 1) return;
  const dim3 heads(static_cast<unsigned>(params.q.num_heads), static_cast<unsigned>(seqs.count));
  TWILIGHT_CUDA(keep_shared_memory(combine_kernel));
  const cudaError_t status = launch_dependent(combine_kernel, heads, dim3(kCombineThreads), 0,
                                              stream, dependent, args, int{kv.head_dim});
  TWILIGHT_CUDA(status);
}

}  // namespace twilight::cuda_fast
