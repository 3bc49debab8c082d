#include "backend/cuda/fast/rows_linear.h"

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/fast/dependent.cuh"
#include "backend/cuda/fast/device_ops.cuh"
#include "backend/cuda/fast/rows_products.cuh"
#include "backend/cuda/fast/stages.cuh"

// rows_kernel: a block of 4 warps takes 64 rows of a matrix, a warp 16 of them (a tile), and a
// share of the columns in stages of 64. Weights and x of the next stages arrive by asynchronous
// copies. Rows 8 to 15 of a tile are the partners of rows 0 to 7: the next eight, the other halves
// of a head that is rotated, or the rows of `up`. Few rows give few blocks, so a cluster shares the
// columns: as many blocks as the shape of the matrix asks for, their sums added in order through
// each other's shared memory. An ordinary launch: where its blocks could start beside those of the
// kernel before, they crowded on the multiprocessors that were free first (a layer of an 8B model
// 142 us instead of 126 on an H200). Bound by the bytes of the matrix. Tests:
// tests/cuda/block_cuda_test.cc, model_cuda_test.cc.
namespace twilight::cuda_fast {
namespace {

constexpr int kThreads = 256;  // of the small ops
constexpr int kRowThreads = 128;
constexpr int kBlockTiles = 4;
constexpr int kWeightBytes = kBlockTiles * kTileRows * kStageColumns * 2;
constexpr int kMostShares = 8;
constexpr int kBlocksWanted = 256;
constexpr int kLeastStages = 6;  // of a block

/// A number in block `rank`'s shared memory.
template <int kShares>
__device__ __forceinline__ float get_float(const float* local, int rank) {
  return __uint_as_float(get_u32<kShares>(reinterpret_cast<const std::uint32_t*>(local), rank));
}

template <int kColumns>
struct StageLayout {
  static constexpr int kBytes = kWeightBytes + kColumns * 8 * kStageColumns * 2;
  static constexpr int kStages = kColumns <= 2 ? 5 : kColumns == 4 ? 4 : 3;
};

/// kColumns times 8 rows of x; kShares blocks of a cluster share the columns.
template <typename E, int kColumns, int kShares>
__global__ void __launch_bounds__(kRowThreads, 4)
    rows_kernel(const __grid_constant__ RowsArgs args) {
#if __CUDA_ARCH__ < 900
  if constexpr (kShares > 1) return;  // never launched there
#endif
  using Layout = StageLayout<kColumns>;
  constexpr int kStages = Layout::kStages;
  constexpr int kSumColumns = kColumns * 8 + 1;
  static_assert(kBlockTiles * kTileRows * kSumColumns * 4 <= Layout::kBytes * kStages);
  extern __shared__ __align__(128) std::uint8_t memory[];
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int share = cluster_rank<kShares>();
  const int first = static_cast<int>(blockIdx.x) / kShares * kBlockTiles;

  // A thread copies one piece of row `copy_row` of every tile.
  const int copy_row = thread / kPieces;
  const int copy_piece = thread % kPieces;
  const std::uint8_t* rows[kBlockTiles];
#pragma unroll
  for (int i = 0; i < kBlockTiles; ++i) {
    rows[i] = weight_row(args, first + i, copy_row);
  }
  const int all = (args.cols + kStageColumns - 1) / kStageColumns;
  const int begin = all * share / kShares;
  const int count = all * (share + 1) / kShares - begin;
  const auto copy_weights = [&](int stage) {
    const int column = (begin + stage) * kStageColumns + 8 * copy_piece;
    const bool inside = stage < count && column < args.cols;
    const std::uint32_t to = base + stage % kStages * Layout::kBytes;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i) {
      copy_async(to + piece_at<kPieces>(kTileRows * i + copy_row, copy_piece),
                 rows[i] + (inside ? 2 * column : 0), inside);
    }
  };
  const auto copy_x = [&](int stage) {
    const int column = (begin + stage) * kStageColumns + 8 * copy_piece;
    const std::uint32_t to = base + stage % kStages * Layout::kBytes + kWeightBytes;
#pragma unroll
    for (int row = copy_row; row < kColumns * 8; row += kRowThreads / kPieces) {
      const bool inside = stage < count && column < args.cols && row < args.m;
      copy_async(to + piece_at<kPieces>(row, copy_piece),
                 static_cast<const E*>(args.x) + (inside ? row * args.x_stride + column : 0),
                 inside);
    }
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    copy_weights(stage);
    copy_x(stage);
    commit_copies();
  }
  float sum[kColumns][4] = {};
#pragma unroll 1
  for (int stage = 0; stage < count; ++stage) {
    wait_copies<kStages - 2>();
    __syncthreads();
    copy_weights(stage + kStages - 1);
    copy_x(stage + kStages - 1);
    commit_copies();
    const std::uint32_t weights = base + stage % kStages * Layout::kBytes;
    multiply_stage<E, kColumns>(sum, weights, weights + kWeightBytes, warp, lane);
  }
  const int g = lane / 4;
  const int t = lane % 4;
  if constexpr (kShares == 1) {
    if (first + warp >= args.num_tiles) return;
    const Tile tile = tile_of(args, first + warp);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = 8 * j + 2 * t + c;
        if (n < args.m) {
          finish<E>(args, *tile.matrix, n, tile.a + g, tile.b + g, sum[j][c], sum[j][2 + c]);
        }
      }
    }
  } else {
    auto* const sums = reinterpret_cast<float*>(memory);  // [row, kSumColumns]
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums[(kTileRows * warp + g + 8 * (k / 2)) * kSumColumns + 8 * j + 2 * t + k % 2] =
            sum[j][k];
      }
    }
    cluster_sync<kShares>();
    const int items = kBlockTiles * 8 * args.m;
    for (int i = share * kRowThreads + thread; i < items; i += kShares * kRowThreads) {
      const int row = i % 8;
      const int n = i / 8 % args.m;
      const int which = i / (8 * args.m);
      if (first + which >= args.num_tiles) continue;
      const float* const at = sums + (kTileRows * which + row) * kSumColumns + n;
      float va = 0;
      float vb = 0;
#pragma unroll
      for (int from = 0; from < kShares; ++from) {
        va += get_float<kShares>(at, from);
        vb += get_float<kShares>(at + 8 * kSumColumns, from);
      }
      const Tile tile = tile_of(args, first + which);
      finish<E>(args, *tile.matrix, n, tile.a + row, tile.b + row, va, vb);
    }
    cluster_sync<kShares>();
  }
}

template <typename E, int kColumns, int kShares>
cudaError_t launch_shares(const RowsArgs& args, cudaStream_t stream) {
  constexpr int kBytes = StageLayout<kColumns>::kBytes * StageLayout<kColumns>::kStages;
  auto* const kernel = rows_kernel<E, kColumns, kShares>;
  static const cudaError_t prepared = [&] {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    return status != cudaSuccess ? status : keep_shared_memory(kernel);
  }();
  if (prepared != cudaSuccess) return prepared;
  const int blocks = (args.num_tiles + kBlockTiles - 1) / kBlockTiles * kShares;
  return launch_dependent<kShares>(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads),
                                   kBytes, stream, false, args);
}

template <typename E, int kColumns>
cudaError_t launch_columns(const RowsArgs& args, int shares, cudaStream_t stream) {
  if (shares == 8) return launch_shares<E, kColumns, 8>(args, stream);
  if (shares == 4) return launch_shares<E, kColumns, 4>(args, stream);
  if (shares == 2) return launch_shares<E, kColumns, 2>(args, stream);
  return launch_shares<E, kColumns, 1>(args, stream);
}

template <typename E>
cudaError_t launch_rows(const RowsArgs& args, bool clusters, cudaStream_t stream) {
  // Not from m: a row's sums must be the same in every batch.
  const int stages = (args.cols + kStageColumns - 1) / kStageColumns;
  const int blocks = (args.num_tiles + kBlockTiles - 1) / kBlockTiles;
  int shares = 1;
  while (clusters && shares < kMostShares && blocks * shares < kBlocksWanted &&
         stages >= 2 * shares * kLeastStages) {
    shares *= 2;
  }
  if (args.m <= 8) return launch_columns<E, 1>(args, shares, stream);
  if (args.m <= 16) return launch_columns<E, 2>(args, shares, stream);
  if (args.m <= 32) return launch_columns<E, 4>(args, shares, stream);
  return launch_columns<E, 8>(args, shares, stream);
}

__device__ float block_sum(float x) {
  __shared__ float parts[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0F;
  return warp_sum(x);
}

constexpr int kNormThreads = 512;

template <typename E>
__global__ void __launch_bounds__(kNormThreads)
    norm_rows_kernel(const float* x, const float* weight, float eps, std::int64_t hidden,
                     uint2* out) {
  start_dependents();
  wait_for_inputs();
  const std::int64_t row = blockIdx.x;
  const int quads = static_cast<int>(hidden / 4);
  const auto* from = reinterpret_cast<const float4*>(x + row * hidden);
  const auto* weights = reinterpret_cast<const float4*>(weight);
  float squares = 0;
  for (int i = threadIdx.x; i < quads; i += kNormThreads) {
    const float4 v = from[i];
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
  }
  const float inverse = 1.0F / sqrtf(block_sum(squares) / static_cast<float>(hidden) + eps);
  for (int i = threadIdx.x; i < quads; i += kNormThreads) {
    const float4 v = from[i];
    const float4 w = weights[i];
    out[row * quads + i] = uint2{round_pair<E>(v.x * inverse * w.x, v.y * inverse * w.y),
                                 round_pair<E>(v.z * inverse * w.z, v.w * inverse * w.w)};
  }
}

template <typename E>
__global__ void __launch_bounds__(kThreads)
    round_rows_kernel(const float* x, std::int64_t x_stride, std::int64_t quads, std::int64_t total,
                      uint2* out) {
  start_dependents();
  wait_for_inputs();
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const float* at = x + i / quads * x_stride + i % quads * 4;
    out[i] = uint2{round_pair<E>(at[0], at[1]), round_pair<E>(at[2], at[3])};
  }
}

__device__ __forceinline__ float gated(float gate, float up) {
  return gate / (1.0F + expf(-gate)) * up;
}

template <typename E>
__global__ void __launch_bounds__(kThreads)
    gate_rows_kernel(const float4* gate, const float4* up, std::int64_t total, uint2* out) {
  start_dependents();
  wait_for_inputs();
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const float4 a = gate[i];
    const float4 b = up[i];
    out[i] = uint2{round_pair<E>(gated(a.x, b.x), gated(a.y, b.y)),
                   round_pair<E>(gated(a.z, b.z), gated(a.w, b.w))};
  }
}

unsigned grid_of(std::int64_t items) {
  constexpr std::int64_t kMost = 4096;
  const std::int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMost ? kMost : blocks);
}

}  // namespace

void number_tiles(RowsArgs& args) {
  args.num_tiles = 0;
  for (int i = 0; i < args.num_matrices; ++i) {
    const RowsMatrix& matrix = args.matrix[i];
    args.first_tile[i] = args.num_tiles;
    const int per_tile = matrix.use == RowsMatrix::Use::kGate ? 8 : 16;
    args.num_tiles += (matrix.rows + per_tile - 1) / per_tile;
  }
}

void rows_linear(const RowsArgs& args, DType dtype, bool clusters, cudaStream_t stream) {
  RowsArgs launch = args;
  number_tiles(launch);
  TWILIGHT_CUDA(dtype == DType::kBf16 ? launch_rows<Bf16>(launch, clusters, stream)
                                      : launch_rows<Half>(launch, clusters, stream));
}

namespace {

template <typename... Params, typename... Args>
void launch_small(void (*bf16)(Params...), void (*f16)(Params...), DType dtype, unsigned blocks,
                  int threads, bool dependent, cudaStream_t stream, const Args&... args) {
  auto* const kernel = dtype == DType::kBf16 ? bf16 : f16;
  TWILIGHT_CUDA(keep_shared_memory(kernel));
  const cudaError_t status =
      launch_dependent(kernel, dim3(blocks), dim3(threads), 0, stream, dependent, args...);
  TWILIGHT_CUDA(status);
}

}  // namespace

void norm_rows(const float* x, const float* weight, float eps, std::int64_t rows,
               std::int64_t hidden, DType dtype, void* out, bool dependent, cudaStream_t stream) {
  launch_small(norm_rows_kernel<Bf16>, norm_rows_kernel<Half>, dtype, static_cast<unsigned>(rows),
               kNormThreads, dependent, stream, x, weight, eps, hidden, static_cast<uint2*>(out));
}

void round_rows(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t cols,
                DType dtype, void* out, bool dependent, cudaStream_t stream) {
  const std::int64_t quads = cols / 4;
  launch_small(round_rows_kernel<Bf16>, round_rows_kernel<Half>, dtype, grid_of(rows * quads),
               kThreads, dependent, stream, x, x_stride, quads, rows * quads,
               static_cast<uint2*>(out));
}

void gate_rows(const float* gate, const float* up, std::int64_t count, DType dtype, void* out,
               bool dependent, cudaStream_t stream) {
  launch_small(gate_rows_kernel<Bf16>, gate_rows_kernel<Half>, dtype, grid_of(count / 4), kThreads,
               dependent, stream, reinterpret_cast<const float4*>(gate),
               reinterpret_cast<const float4*>(up), count / 4, static_cast<uint2*>(out));
}

}  // namespace twilight::cuda_fast
