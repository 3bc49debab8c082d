#ifndef TWILIGHT_BACKEND_CUDA_FAST_LAYER_RING_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_LAYER_RING_CUH_

#include "backend/cuda/fast/barrier.cuh"
#include "backend/cuda/fast/device_ops.cuh"
#include "backend/cuda/fast/grid_ring.cuh"
#include "backend/cuda/fast/layer_products.h"
#include "backend/cuda/fast/rows_products.cuh"
#include "backend/cuda/fast/stages.cuh"

/// layer_products.cu: how a step is cut, and the warps that fill the ring of stages.
namespace twilight::cuda_fast {

inline constexpr int kBandTiles = 8;
inline constexpr int kBandRows = kBandTiles * kTileRows;
inline constexpr int kBandBytes = kBandRows * kStageColumns * 2;
inline constexpr int kMathThreads = 2 * 32 * kBandTiles;
inline constexpr int kWeightThreads = 128;
inline constexpr int kXWarps = 2;
inline constexpr int kLayerThreads = kMathThreads + kWeightThreads + 32 * kXWarps;
// Stages of weights on their way at once. What waits in memory delays all that is read besides: few
// at the end of a step, where that is what the next one waits for.
inline constexpr int kFlying = 6;
inline constexpr int kBorderFlying = 3;

// Counters of events, 128 bytes apart: of each step its x and its end; then blocks that are done.
inline constexpr int kCounterWords = 32;
inline constexpr int kDone = 2 * kMostLayerSteps;

__device__ __forceinline__ std::uint32_t* x_event(const LayerArgs& args, int step) {
  return args.counters + 2 * step * kCounterWords;
}
__device__ __forceinline__ std::uint32_t* end_event(const LayerArgs& args, int step) {
  return args.counters + (2 * step + 1) * kCounterWords;
}

/// (band, stage) pairs of a block: [run_begin(b), run_begin(b + 1)).
__device__ __forceinline__ int run_begin(const LayerStep& step, int block) {
  return step.bands * step.stages * block / static_cast<int>(gridDim.x);
}

__device__ __forceinline__ int band_begin(const LayerStep& step, int band) {
  return step.whole ? step.rows.num_tiles * band / step.bands : kBandTiles * band;
}
__device__ __forceinline__ int band_end(const LayerStep& step, int band) {
  return step.whole ? step.rows.num_tiles * (band + 1) / step.bands
                    : min(kBandTiles * (band + 1), step.rows.num_tiles);
}

template <int kColumns>
struct LayerLayout {
  static constexpr int kRows = 8 * kColumns;
  static constexpr int kBytes = kBandBytes + kRows * kStageColumns * 2;
  /// Floats of a part: [row of x, row of the band].
  static constexpr int kPart = kRows * kBandRows;
  /// Warps that share a tile, each with its rows of x.
  static constexpr int kSharing = kColumns >= 4 ? 2 : 1;
};

/// Shared memory: the ring, then barriers of full and of free stages.
struct Ring {
  std::uint32_t base;
  std::uint32_t barriers;
  int stages;

  __device__ __forceinline__ std::uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ std::uint32_t free(int stage) const {
    return barriers + 16 * stage + 8;
  }
};

template <typename E, int kColumns>
__device__ __forceinline__ void copy_weights(const LayerArgs& args, const Ring& ring, int thread) {
  using Layout = LayerLayout<kColumns>;
  // A thread copies one piece of row `row` of every tile.
  const int row = thread / kPieces;
  const int piece = thread % kPieces;
  const std::uint32_t to_piece = piece_at<kPieces>(row, piece);
  RingPlace place;
#pragma unroll 1
  for (int s = 0; s < args.num_steps; ++s) {
    const LayerStep& step = args.step[s];
    const RowsArgs& rows = step.rows;
    const int end = run_begin(step, static_cast<int>(blockIdx.x) + 1);
    int at = run_begin(step, static_cast<int>(blockIdx.x));
    const int border = at + ring.stages;
#pragma unroll 1
    while (at < end) {
      const int band = at / step.stages;
      const int first = band_begin(step, band);
      const int tiles = band_end(step, band) - first;
      const std::uint8_t* from[kBandTiles];
#pragma unroll
      for (int i = 0; i < kBandTiles; ++i) {
        from[i] = weight_row(rows, first + i, row);
      }
      int column = (at - band * step.stages) * kStageColumns + 8 * piece;
      const int stop = min(end, (band + 1) * step.stages);
#pragma unroll 1
      for (; at < stop; ++at) {
        wait_barrier(ring.free(place.stage), place.parity ^ 1);
        if (at < border) {
          wait_copies<kBorderFlying - 1>();
        } else {
          wait_copies<kFlying - 1>();
        }
        const std::uint32_t to = ring.base + place.stage * Layout::kBytes + to_piece;
        const bool inside = column < rows.cols;
#pragma unroll
        for (int i = 0; i < kBandTiles; ++i) {
          if (i < tiles) {
            copy_async(to + i * (kBandBytes / kBandTiles), from[i] + (inside ? 2 * column : 0),
                       inside);
          }
        }
        commit_copies();
        arrive_after_copies(ring.full(place.stage));
        place.advance(ring.stages);
        column += kStageColumns;
      }
    }
  }
}

/// Warp w takes every kXWarps-th stage from the w-th on.
template <typename E, int kColumns>
__device__ __forceinline__ void copy_x(const LayerArgs& args, const Ring& ring, int thread) {
  using Layout = LayerLayout<kColumns>;
  constexpr int kRowsOnce = 32 / kPieces;
  const int lane = thread % 32;
  const int piece = lane % kPieces;
  const int first_row = lane / kPieces;
  const auto grid = static_cast<int>(gridDim.x);
  RingPlace place;
  int skip = thread / 32;  // stages of other warps before the next
  for (int i = 0; i < skip; ++i) place.advance(ring.stages);
#pragma unroll 1
  for (int s = 0; s < args.num_steps; ++s) {
    const LayerStep& step = args.step[s];
    const RowsArgs& rows = step.rows;
    const int begin = run_begin(step, static_cast<int>(blockIdx.x));
    const int end = run_begin(step, static_cast<int>(blockIdx.x) + 1);
    if (lane == 0) {
      if (step.before != LayerStep::Before::kNothing) {
        const bool all = step.before == LayerStep::Before::kRound;
        wait_event(x_event(args, s), static_cast<std::uint32_t>(all ? grid : min(grid, rows.m)));
      } else if (s > 0) {
        wait_event(end_event(args, s - 1), static_cast<std::uint32_t>(grid));
      }
    }
    __syncwarp();
    const int m = rows.m;
    const int cols = rows.cols;
    const int stages = step.stages;
    const std::int64_t more_rows = kRowsOnce * rows.x_stride;
    const E* const x = static_cast<const E*>(rows.x) + first_row * rows.x_stride;
    int at = begin + skip;
    int stage = at % stages;
#pragma unroll 1
    for (; at < end; at += kXWarps) {
      wait_barrier(ring.free(place.stage), place.parity ^ 1);
      const std::uint32_t to = ring.base + place.stage * Layout::kBytes + kBandBytes;
      const int column = stage * kStageColumns + 8 * piece;
      const E* from = x + column;
#pragma unroll
      for (int i = 0; i < Layout::kRows / kRowsOnce; ++i) {
        const int row = first_row + i * kRowsOnce;
        const bool inside = column < cols && row < m;
        copy_async(to + piece_at<kPieces>(row, piece), inside ? from : x, inside);
        from += more_rows;
      }
      arrive_after_copies(ring.full(place.stage));
#pragma unroll
      for (int i = 0; i < kXWarps; ++i) place.advance(ring.stages);
      stage += kXWarps;
      while (stage >= stages) stage -= stages;
    }
    skip = at - end;
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_LAYER_RING_CUH_
