#ifndef TWILIGHT_BACKEND_CUDA_FAST_QUEST_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_QUEST_CUH_

#include "backend/cuda/fast/step_state.cuh"

/// Quest scores: sum_d max(q_d min_d, q_d max_d) = q- . min + q+ . max, two products of 16-bit
/// matrix instructions. One warp, 8 pages at a time.
namespace twilight::cuda_fast {

/// Rows of a 16-bit query (high parts, then low parts) as A fragments, chunk by chunk.
template <class C, typename Element, int kRowLength>
__device__ __forceinline__ void row_products(float (&acc)[4],
                                             const std::uint16_t (&rows)[C::kQueryRows][kRowLength],
                                             const uint4 (&x)[C::kDim / 32], int g, int t) {
#pragma unroll
  for (int i = 0; i < C::kDim / 32; ++i) {
    const uint4 q = *reinterpret_cast<const uint4*>(&rows[g][(4 * i + t) * 8]);
    uint4 low = make_uint4(0, 0, 0, 0);
    if constexpr (C::kHeads == 8) {
      low = *reinterpret_cast<const uint4*>(&rows[8 + g][(4 * i + t) * 8]);
    }
    mma_16<Element>(acc, q.x, low.x, q.y, low.y, x[i].x, x[i].y);
    mma_16<Element>(acc, q.z, low.z, q.w, low.w, x[i].z, x[i].w);
  }
}

/// Adds the low parts: the products of head g (g % 4 of up to four) with columns 2 t, 2 t + 1.
template <class C>
__device__ __forceinline__ float2 whole_products(const float (&acc)[4]) {
  if constexpr (C::kHeads == 8) return make_float2(acc[0] + acc[2], acc[1] + acc[3]);
  return make_float2(acc[0] + __shfl_xor_sync(kFullMask, acc[0], 16),
                     acc[1] + __shfl_xor_sync(kFullMask, acc[1], 16));
}

/// Order of floats as unsigned integers; NaN is 0.
__device__ __forceinline__ std::uint32_t float_key(float x) {
  if (!(x == x)) return 0;
  const std::uint32_t bits = __float_as_uint(x);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}

template <class C>
__device__ void score_by_bounds(const Step<C>& step, const FirstLoads<C>& first) {
  constexpr int kTile = 8;
  const int tiles = (step.sealed() + kTile - 1) / kTile;
  const int stride = C::kWarps * C::kCluster;
  const int last = step.sealed() - 1;
  int tile = step.warp() * C::kCluster + step.rank();
  uint4 min[C::kDim / 32];
  uint4 max[C::kDim / 32];
  const auto page_id = [&](int at) { return step.table()[::min(kTile * at + step.g(), last)]; };
  const auto load = [&](int page) {
    const std::uint8_t* row = step.record(kSummaries, page) + 16 * step.t();
#pragma unroll
    for (int i = 0; i < C::kDim / 32; ++i) {
      min[i] = load_stream16(row + 64 * i);
      max[i] = load_stream16(row + 2 * C::kDim + 64 * i);
    }
  };
  int next_page = 0;
  if (tile < tiles) {
    load(kTile * tile + step.g() <= last ? first.pages[0] : step.table()[last]);
    next_page = kTile * (tile + stride) + step.g() <= last ? first.next[0] : step.table()[last];
  }
  prepare_query(step, first);
  cluster_sync<C::kCluster>();  // every block has started: its memory may be written from here on
  step.stamp(1);
  while (tile < tiles) {
    float acc[4] = {};
    row_products<C, Bf16>(acc, step.s.q_signed[0], min, step.g(), step.t());
    row_products<C, Bf16>(acc, step.s.q_signed[1], max, step.g(), step.t());
    const int next = tile + stride;
    if (next < tiles) {
      load(next_page);
      next_page = page_id(next + stride);
    }
    const float2 products = whole_products<C>(acc);
    const int head = C::kHeads == 8 ? step.g() : step.g() % 4;
    float score[2] = {products.x, products.y};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      score[k] = column_max(head < step.args.group ? score[k] : -INFINITY);
      const int page = kTile * tile + 2 * step.t() + k;
      if (page <= last && step.g() < C::kCluster) {
        put_u32<C::kCluster>(&step.keys()[page], step.g(), float_key(score[k]));
      }
    }
    tile = next;
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_QUEST_CUH_
