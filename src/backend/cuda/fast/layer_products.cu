#include "backend/cuda/fast/layer_products.h"

#include <algorithm>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/fast/dependent.cuh"
#include "backend/cuda/fast/layer_ring.cuh"
#include "backend/cuda/fast/layer_rows.cuh"

// layer_kernel: one block on every multiprocessor goes through the steps together. Sixteen warps
// multiply, a tile of 16 rows each (two a tile with many rows of x); four copy weights into a ring
// of stages (a band of up to eight tiles by 64 columns), two copy the x beside them. Warps that
// copy weights wait for free stages alone, so at the end of a step the ring fills with weights of
// the next one while sums are finished, other blocks are waited for and x is made; the warps that
// copy x wait for that. A step's (band, stage) pairs are cut into equal runs, one a block, so that
// all end together. Sums of a run go to `parts` and are added in the order of the columns after all
// blocks are done; steps with a gate have so many rows that every block gets bands of its own. Cuts
// follow from the matrix and the number of multiprocessors. Launched as a cooperative kernel, since
// blocks wait for each other. Tests: tests/cuda/block_cuda_test.cc.
namespace twilight::cuda_fast {
namespace {

constexpr int kMostRing = 14;
constexpr int kRingAlign = 128;
constexpr int kLeastBlockTiles = 4;
constexpr int kStaticBytes = kMostBands * 8 + 256;
constexpr std::size_t kCounterBytes = (kDone + 1) * kCounterWords * sizeof(std::uint32_t);

template <typename E, int kColumns>
__device__ __forceinline__ void make_x(const LayerArgs& args, int s, BandParts* parts) {
  const LayerStep& step = args.step[s];
  const int grid = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  if (step.before == LayerStep::Before::kRound) {
    round_x<E>(step);
    signal_block(x_event(args, s));
    return;
  }
  const int first = step.rows.m * block / grid;
  const int last = step.rows.m * (block + 1) / grid;
  if (first == last) return;
  if (s > 0) find_parts(args.step[s - 1], parts);
#pragma unroll 1
  for (int n = first; n < last; ++n) norm_x<E, kColumns>(args, s, n, parts);
  signal_block(x_event(args, s));
}

template <typename E, int kColumns>
__device__ __forceinline__ void multiply(const LayerArgs& args, const LayerStep& step,
                                         const Ring& ring, RingPlace& place) {
  using Layout = LayerLayout<kColumns>;
  constexpr int kMine = kColumns / Layout::kSharing;
  const int warp = static_cast<int>(threadIdx.x) / 32 % kBandTiles;
  const int first_column = static_cast<int>(threadIdx.x) / (32 * kBandTiles) * kMine;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (first_column >= kColumns) return;
  const int g = lane / 4;
  const int t = lane % 4;
  const int block = static_cast<int>(blockIdx.x);
  const RowsArgs& rows = step.rows;
  const int begin = run_begin(step, block);
  const int end = run_begin(step, block + 1);
  int at = begin;
#pragma unroll 1
  while (at < end) {
    const int band = at / step.stages;
    const int number = band_begin(step, band) + warp;
    const bool inside = number < band_end(step, band);
    const int stop = min(end, (band + 1) * step.stages);
    float sum[kMine][4] = {};
#pragma unroll 1
    for (; at < stop; ++at) {
      wait_barrier(ring.full(place.stage), place.parity);
      const std::uint32_t weights = ring.base + place.stage * Layout::kBytes;
      const std::uint32_t x = weights + kBandBytes + first_column * 8 * kStageColumns * 2;
      if (inside) multiply_stage<E, kMine>(sum, weights, x, warp, lane);
      // Every lane for itself: compute-sanitizer does not follow one that arrives for its warp.
      arrive(ring.free(place.stage));
      place.advance(ring.stages);
    }
    if (!inside) continue;
    const Tile tile = tile_of(rows, number);
    const int slot = 2 * block + (band * step.stages > begin ? 1 : 0);
    float* const part = args.parts + std::int64_t{slot} * Layout::kPart + kTileRows * warp + g;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = 8 * (first_column + j) + 2 * t + c;
        if (n >= rows.m) continue;
        if (step.whole) {
          finish<E>(rows, *tile.matrix, n, tile.a + g, tile.b + g, sum[j][c], sum[j][2 + c]);
        } else {
          part[n * kBandRows] = sum[j][c];
          part[n * kBandRows + 8] = sum[j][2 + c];
        }
      }
    }
  }
}

template <typename E, int kColumns>
__global__ void __launch_bounds__(kLayerThreads, 1)
    layer_kernel(const __grid_constant__ LayerArgs args) {
  using Layout = LayerLayout<kColumns>;
  extern __shared__ __align__(kRingAlign) std::uint8_t memory[];
  __shared__ BandParts parts[kMostBands];
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  const Ring ring{base, base + args.ring * Layout::kBytes, args.ring};
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < args.ring) {
    init_barrier(ring.full(thread), kWeightThreads + 32);
    init_barrier(ring.free(thread), 32 * kBandTiles * Layout::kSharing);
  }
  __syncthreads();
  if (thread >= kMathThreads + kWeightThreads) {
    copy_x<E, kColumns>(args, ring, thread - kMathThreads - kWeightThreads);
    return;
  }
  if (thread >= kMathThreads) {
    copy_weights<E, kColumns>(args, ring, thread - kMathThreads);
    return;
  }
  const int grid = static_cast<int>(gridDim.x);
  const int last = args.num_steps - 1;
  RingPlace place;
#pragma unroll 1
  for (int s = 0; s <= last; ++s) {
    if (args.step[s].before != LayerStep::Before::kNothing) make_x<E, kColumns>(args, s, parts);
    multiply<E, kColumns>(args, args.step[s], ring, place);
    if (s < last || !args.step[s].whole) signal_block(end_event(args, s));
  }
  if (!args.step[last].whole) {
    find_parts(args.step[last], parts);
    wait_blocks(end_event(args, last), grid);
    finish_parts<E, kColumns>(args, args.step[last], parts);
  }
  // The last block to end leaves the counters as they were.
  if (thread != 0) return;
  if (atomicAdd(args.counters + kDone * kCounterWords, 1U) != gridDim.x - 1) return;
  for (int i = 0; i <= kDone; ++i) args.counters[i * kCounterWords] = 0;
}

// --- launches -----------------------------------------------------------------------------------

template <typename E, int kColumns>
cudaError_t launch_layer(LayerArgs args, const LayerDevice& device, cudaStream_t stream) {
  using Layout = LayerLayout<kColumns>;
  constexpr int kStageBytes = Layout::kBytes + 16;
  auto* const kernel = layer_kernel<E, kColumns>;
  args.ring = std::min(kMostRing, (device.shared_bytes - kStaticBytes) / kStageBytes);
  const int bytes = args.ring * kStageBytes;
  static const cudaError_t prepared = [&] {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes - kStaticBytes);
    return status != cudaSuccess ? status : keep_shared_memory(kernel);
  }();
  if (prepared != cudaSuccess) return prepared;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(device.blocks));
  config.blockDim = dim3(kLayerThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename E>
cudaError_t launch_layer_rows(const LayerArgs& args, const LayerDevice& device,
                              cudaStream_t stream) {
  const std::int32_t m = args.step[0].rows.m;
  if (m <= 8) return launch_layer<E, 1>(args, device, stream);
  if (m <= 16) return launch_layer<E, 2>(args, device, stream);
  if (m <= 32) return launch_layer<E, 4>(args, device, stream);
  return launch_layer<E, 8>(args, device, stream);
}

/// Tiles of a step's matrices, and how they are cut.
LayerStep cut_step(const LayerStep& step, const LayerDevice& device) {
  LayerStep out = step;
  number_tiles(out.rows);
  out.stages = (step.rows.cols + kStageColumns - 1) / kStageColumns;
  const int tiles = out.rows.num_tiles;
  out.whole = step.rows.matrix[0].use == RowsMatrix::Use::kGate;
  const int most = kBandTiles * device.blocks;
  out.bands =
      out.whole ? (tiles + most - 1) / most * device.blocks : (tiles + kBandTiles - 1) / kBandTiles;
  return out;
}

}  // namespace

bool layer_step_fits(const LayerStep& step, const LayerDevice& device) {
  const LayerStep cut = cut_step(step, device);
  // Every block has a part of every step, of two bands of it at most.
  if (cut.whole ? cut.rows.num_tiles < kLeastBlockTiles * device.blocks
                : cut.bands > std::min(device.blocks, kMostBands) ||
                      cut.bands * cut.stages < device.blocks) {
    return false;
  }
  return (std::int64_t{cut.bands} * cut.stages + 1) * (device.blocks + 1) < (std::int64_t{1} << 31);
}

std::size_t layer_bytes(const LayerDevice& device) {
  return kCounterBytes +
         std::size_t{2} * device.blocks * LayerLayout<kMaxLinearRows / 8>::kPart * sizeof(float);
}

void layer_products(const LayerArgs& args, DType dtype, const LayerDevice& device, void* memory,
                    cudaStream_t stream) {
  LayerArgs launch = args;
  for (int i = 0; i < args.num_steps; ++i) launch.step[i] = cut_step(args.step[i], device);
  launch.counters = static_cast<std::uint32_t*>(memory);
  launch.parts = reinterpret_cast<float*>(static_cast<std::uint8_t*>(memory) + kCounterBytes);
  TWILIGHT_CUDA(dtype == DType::kBf16 ? launch_layer_rows<Bf16>(launch, device, stream)
                                      : launch_layer_rows<Half>(launch, device, stream));
}

}  // namespace twilight::cuda_fast
