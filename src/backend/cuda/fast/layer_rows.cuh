#ifndef TWILIGHT_BACKEND_CUDA_FAST_LAYER_ROWS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_LAYER_ROWS_CUH_

#include "backend/cuda/device/elements.cuh"
#include "backend/cuda/fast/layer_ring.cuh"

/// layer_products.cu: sums of a step's parts and rows of x, by the warps that multiply.
namespace twilight::cuda_fast {

inline constexpr int kMostBands = 256;  // of a step that is cut
inline constexpr int kMostParts = 6;    // loads of a sum that are in flight together

/// Where the sums of a band's runs lie, in the order of the columns: `first`, then the even places
/// from `next` on. A block has parts of two bands at most, at places 2 b and 2 b + 1.
struct BandParts {
  std::int16_t first;
  std::int16_t next;
  std::int32_t count;
};

__device__ __forceinline__ BandParts parts_of(const LayerStep& step, int band) {
  const int grid = static_cast<int>(gridDim.x);
  const int all = step.bands * step.stages;
  const int begin = band * step.stages;
  const int first = ((begin + 1) * grid - 1) / all;
  const int last = ((begin + step.stages) * grid - 1) / all;
  return {static_cast<std::int16_t>(2 * first + (run_begin(step, first) < begin ? 1 : 0)),
          static_cast<std::int16_t>(2 * first + 2), last - first + 1};
}

__device__ __forceinline__ void sync_math() {
  asm volatile("bar.sync 1, %0;" ::"n"(kMathThreads) : "memory");
}
/// Once all of a block's threads have come here.
__device__ __forceinline__ void signal_block(std::uint32_t* counter) {
  sync_math();
  if (threadIdx.x == 0) signal_event(counter);
}
__device__ __forceinline__ void wait_blocks(const std::uint32_t* counter, int count) {
  if (threadIdx.x == 0) wait_event(counter, static_cast<std::uint32_t>(count));
  sync_math();
}

__device__ __forceinline__ float math_sum(float x) {
  constexpr int kWarps = kMathThreads / 32;
  __shared__ float warps[kWarps];
  x = warp_sum(x);
  sync_math();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  sync_math();
  return warp_sum(threadIdx.x % 32 < kWarps ? warps[threadIdx.x % 32] : 0.0F);
}

template <typename E>
__device__ __forceinline__ void round_x(const LayerStep& step) {
  const int quads = step.rows.cols / 4;
  const int all = quads * step.rows.m;
  auto* const out = reinterpret_cast<uint2*>(const_cast<void*>(step.rows.x));
  for (int i = static_cast<int>(blockIdx.x * kMathThreads + threadIdx.x); i < all;
       i += static_cast<int>(gridDim.x) * kMathThreads) {
    const float4 v = *reinterpret_cast<const float4*>(step.source + i / quads * step.source_stride +
                                                      i % quads * 4);
    out[i] = uint2{round_pair<E>(v.x, v.y), round_pair<E>(v.z, v.w)};
  }
}

__device__ __forceinline__ void add(float4& to, float4 x) {
  to.x += x.x;
  to.y += x.y;
  to.z += x.z;
  to.w += x.w;
}

/// Parts of every band of a step; other warps may not have read those of the step before.
__device__ __forceinline__ void find_parts(const LayerStep& step, BandParts* parts) {
  sync_math();
  for (int band = static_cast<int>(threadIdx.x); band < step.bands; band += kMathThreads) {
    parts[band] = parts_of(step, band);
  }
  sync_math();
}

/// Row n of `source`, with the sums of the step before where there is one.
template <typename E, int kColumns>
__device__ __forceinline__ void norm_x(const LayerArgs& args, int s, int n,
                                       const BandParts* all_parts) {
  using Layout = LayerLayout<kColumns>;
  constexpr int kBandQuads = kBandRows / 4;
  constexpr int kNextPart = 2 * Layout::kPart / 4;
  constexpr int kOnce = 2;  // quads of a thread
  const LayerStep& step = args.step[s];
  const int thread = static_cast<int>(threadIdx.x);
  const int quads = step.rows.cols / 4;
  auto* const source =
      reinterpret_cast<float4*>(const_cast<float*>(step.source) + n * step.source_stride);
  const auto* const weight = reinterpret_cast<const float4*>(step.norm_weight);
  float4 v[kOnce];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kOnce; ++i) {
      const int quad = first + i * kMathThreads;
      v[i] = quad < quads ? __ldcg(source + quad) : float4{};
    }
  };
  load(thread);
  const float* bias = nullptr;
  if (s > 0) {
    bias = args.step[s - 1].rows.matrix[0].bias;
    wait_blocks(end_event(args, s - 1), static_cast<int>(gridDim.x));
  }
  float squares = 0;
#pragma unroll 1
  for (int first = thread; first < quads; first += kOnce * kMathThreads) {
    if (first != thread) load(first);
    if (s > 0) {
      // What is not there is read from elsewhere: loads without branches fly together.
      const auto* const row =
          reinterpret_cast<const float4*>(args.parts + n * kBandRows) + thread % kBandQuads;
      BandParts parts[kOnce];
      float4 part[kOnce][kMostParts];
#pragma unroll
      for (int i = 0; i < kOnce; ++i) {
        parts[i] = all_parts[min(first + i * kMathThreads, quads - 1) / kBandQuads];
        const float4* const from = row + parts[i].first * (Layout::kPart / 4);
        const float4* const next = row + parts[i].next * (Layout::kPart / 4);
        part[i][0] = __ldcg(from);
#pragma unroll
        for (int b = 1; b < kMostParts; ++b) {
          part[i][b] = __ldcg(b < parts[i].count ? next + (b - 1) * kNextPart : from);
        }
      }
#pragma unroll
      for (int i = 0; i < kOnce; ++i) {
        add(v[i], part[i][0]);
#pragma unroll
        for (int b = 1; b < kMostParts; ++b) {
          if (b < parts[i].count) add(v[i], part[i][b]);
        }
        const float4* const next = row + parts[i].next * (Layout::kPart / 4);
#pragma unroll 1
        for (int b = kMostParts; b < parts[i].count; ++b) {
          add(v[i], __ldcg(next + (b - 1) * kNextPart));
        }
      }
#pragma unroll
      for (int i = 0; i < kOnce; ++i) {
        const int quad = first + i * kMathThreads;
        if (quad >= quads) continue;
        if (bias != nullptr) {
          const float* const at = bias + 4 * quad;
          add(v[i], float4{at[0], at[1], at[2], at[3]});
        }
        source[quad] = v[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kOnce; ++i) {
      const float square =
          fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, v[i].w * v[i].w)));
      squares += first + i * kMathThreads < quads ? square : 0.0F;
    }
  }
  float4 w[kOnce];
  const auto load_weights = [&](int first) {
#pragma unroll
    for (int i = 0; i < kOnce; ++i) w[i] = weight[min(first + i * kMathThreads, quads - 1)];
  };
  load_weights(thread);
  const float inverse =
      1.0F / sqrtf(math_sum(squares) / static_cast<float>(step.rows.cols) + step.eps);
  auto* const out = reinterpret_cast<uint2*>(const_cast<void*>(step.rows.x)) + n * quads;
  const bool kept = quads <= kOnce * kMathThreads;
#pragma unroll 1
  for (int first = thread; first < quads; first += kOnce * kMathThreads) {
    if (!kept) {
      load(first);
      load_weights(first);
    }
#pragma unroll
    for (int i = 0; i < kOnce; ++i) {
      const int quad = first + i * kMathThreads;
      if (quad >= quads) continue;
      out[quad] = uint2{round_pair<E>(v[i].x * inverse * w[i].x, v[i].y * inverse * w[i].y),
                        round_pair<E>(v[i].z * inverse * w[i].z, v[i].w * inverse * w[i].w)};
    }
  }
}

/// Row n's channel `channel` over all heads, into the cache.
__device__ __forceinline__ void append(const CacheRows& cache, std::int64_t slot, int channel,
                                       float value) {
  const std::int64_t page = slot / cache.page_size;
  const int head = channel / cache.head_dim;
  const std::int64_t at = page * cache.page_stride + head * cache.head_stride +
                          (slot - page * cache.page_size) * cache.token_stride + channel -
                          head * cache.head_dim;
  if (cache.bf16) {
    cuda::store_element(static_cast<Bf16*>(cache.data) + at, value);
  } else {
    cuda::store_element(static_cast<Half*>(cache.data) + at, value);
  }
}

/// Adds the parts of the last step's bands.
template <typename E, int kColumns>
__device__ __forceinline__ void finish_parts(const LayerArgs& args, const LayerStep& step,
                                             const BandParts* all_parts) {
  using Layout = LayerLayout<kColumns>;
  constexpr int kPairs = kBandRows / 2;
  const int m = step.rows.m;
  const int items = step.bands * m * kPairs;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x * kMathThreads + threadIdx.x); i < items;
       i += static_cast<int>(gridDim.x) * kMathThreads) {
    const int row = i % 8;
    const int which = i / 8 % kBandTiles;
    const int band = i / kPairs / m;
    const int n = i / kPairs - band * m;
    const int number = band_begin(step, band) + which;
    if (number >= band_end(step, band)) continue;
    const BandParts parts = all_parts[band];
    const float* const at = args.parts + n * kBandRows + which * kTileRows + row;
    const float* p = at + std::int64_t{parts.first} * Layout::kPart;
    float va = __ldcg(p);
    float vb = __ldcg(p + 8);
    p = at + std::int64_t{parts.next} * Layout::kPart;
#pragma unroll 4
    for (int b = 1; b < parts.count; ++b, p += 2 * Layout::kPart) {
      va += __ldcg(p);
      vb += __ldcg(p + 8);
    }
    const Tile tile = tile_of(step.rows, number);
    const float2 y = finish<E>(step.rows, *tile.matrix, n, tile.a + row, tile.b + row, va, vb);
    const CacheRows& cache = args.cache[tile.matrix - step.rows.matrix];
    if (cache.data == nullptr) continue;
    const std::int64_t slot = args.slots[n];
    if (tile.a + row < tile.matrix->rows) append(cache, slot, tile.a + row, y.x);
    if (tile.b + row < tile.matrix->rows) append(cache, slot, tile.b + row, y.y);
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_LAYER_ROWS_CUH_
