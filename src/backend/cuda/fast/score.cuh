#ifndef TWILIGHT_BACKEND_CUDA_FAST_SCORE_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_SCORE_CUH_

#include "backend/cuda/fast/select.cuh"

/// Page scores. One warp, 16 pages at a time.
///
/// kCentroid: a page's log2 mass per head, l = log2(15 2^(a + v) + 2^b), and its centre product a
/// are kept as 16-bit distances below the largest of the tile (steps of 1 / 256, so off by at most
/// 2^-9; 256 and more below saturates). kHalfCentroid: l = log2(8 2^a + 8 2^a') + v, both products
/// kept. Tile masses are summed in an order that does not depend on
/// the number of threads or blocks.
namespace twilight::cuda_fast {

template <class C>
struct ScoreTile {
  Words<C::kSteps> centre[2];
  Words<C::kSteps> deviant[2];
  std::uint32_t scales[2];    ///< f16 centre scale, f16 deviant scale
  std::uint32_t variance[2];  ///< f16 in the low half

  __device__ __forceinline__ void load(const Step<C>& step, int page0, int page1) {
    const int pages[2] = {page0, page1};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint8_t* row = step.record(kSummaries, pages[i]) + step.t() * (4 * C::kSteps);
      centre[i] = load_words<C::kSteps>(row);
      deviant[i] = load_words<C::kSteps>(row + C::kDim / 2);
      const std::uint8_t* params = step.record(kParams, pages[i]);
      scales[i] = load_stream4(params);
      variance[i] = load_stream4(params + 8);
    }
  }
};

/// Products of nibble rows of pages g (rows 0 to 7) and g + 8 with the integer query.
template <class C>
__device__ __forceinline__ void nibble_products(const Words<C::kSteps>& x,
                                                const Words<C::kSteps>& y, const QueryCodes<C>& q,
                                                int head_set, float (&out)[2]) {
  int c0 = 0;
  int c1 = 0;
  int c2 = 0;
  int c3 = 0;
#pragma unroll
  for (int j = 0; j < C::kSteps; ++j) {
    mma_u8s8(c0, c1, c2, c3, x.w[j] & 0x0f0f0f0fU, y.w[j] & 0x0f0f0f0fU,
             (x.w[j] >> 4) & 0x0f0f0f0fU, (y.w[j] >> 4) & 0x0f0f0f0fU, q.b[head_set][2 * j],
             q.b[head_set][2 * j + 1]);
  }
  out[0] = static_cast<float>(128 * c0 + c1);
  out[1] = static_cast<float>(128 * c2 + c3);
}

__device__ __forceinline__ float2 f16_pair(std::uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

/// log2(2^a + 2^b), one of them finite.
__device__ __forceinline__ float log2_add(float a, float b) {
  return fmaxf(a, b) + log2_fast(1.0F + exp2_fast(-fabsf(a - b)));
}

/// Steps of `value` below `base`, saturated; NaN and -inf are the lowest.
__device__ __forceinline__ std::uint32_t steps_below(float base, float value) {
  return __float2uint_rn(fmaxf(fminf((base - value) * kLogSteps, 65535.0F), 0.0F));
}

template <class C>
__device__ void score_by_mass(const Step<C>& step, const FirstLoads<C>& first) {
  Fixed<C>& s = step.s;
  const int tiles = (step.sealed() + kPage - 1) / kPage;
  const int stride = C::kWarps * C::kCluster;
  int tile = step.warp() * C::kCluster + step.rank();
  const int last = step.sealed() - 1;
  const auto page_id = [&](int at, int half) {
    return step.table()[min(kPage * at + step.g() + 8 * half, last)];
  };
  ScoreTile<C> data;
  int next0 = 0;
  int next1 = 0;
  // Entries behind the last sealed page stand for nothing: such lanes repeat that page.
  const auto known = [&](int at, int half, int id) {
    return kPage * at + step.g() + 8 * half <= last ? id : step.table()[last];
  };
  if (tile < tiles) {
    data.load(step, known(tile, 0, first.pages[0]), known(tile, 1, first.pages[1]));
    next0 = known(tile + stride, 0, first.next[0]);
    next1 = known(tile + stride, 1, first.next[1]);
  }
  prepare_query(step, first);
  cluster_sync<C::kCluster>();  // every block has started: its memory may be written from here on
  step.stamp(1);

  QueryCodes<C> q;
  q.load(step);
  float unit[C::kLaneHeads];
  float offset[C::kLaneHeads];
  float spread[C::kLaneHeads];
#pragma unroll
  for (int i = 0; i < C::kLaneHeads; ++i) {
    unit[i] = s.q_step[step.t() + 4 * i];
    offset[i] = 7.5F * s.q_sum[step.t() + 4 * i];
    spread[i] = s.q_spread[step.t() + 4 * i];
  }
  while (tile < tiles) {
    float centre[C::kLaneHeads][2];
    float deviant[C::kLaneHeads][2];
#pragma unroll
    for (int i = 0; i < C::kLaneHeads; ++i) {
      nibble_products<C>(data.centre[0], data.centre[1], q, i, centre[i]);
      nibble_products<C>(data.deviant[0], data.deviant[1], q, i, deviant[i]);
    }
    float2 scales[2];
    float variance[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      scales[k] = f16_pair(data.scales[k]);
      variance[k] = f16_pair(data.variance[k]).x;
    }
    const int next = tile + stride;
    if (next < tiles) {
      data.load(step, next0, next1);
      next0 = page_id(next + stride, 0);
      next1 = page_id(next + stride, 1);
    }
    const int slot = tile / C::kCluster;
#pragma unroll
    for (int i = 0; i < C::kLaneHeads; ++i) {
      const int head = step.t() + 4 * i;
      float l[2];
      float a[2];
      float second[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        a[k] = scales[k].x * (unit[i] * centre[i][k] - offset[i]);
        const float other = scales[k].y * (unit[i] * deviant[i][k] - offset[i]);
        if constexpr (C::kMeans == 2) {
          second[k] = other;
          l[k] = log2_add(a[k], other) + spread[i] * variance[k] + 3.0F;
        } else {
          second[k] = a[k];
          l[k] = log2_add(a[k] + spread[i] * variance[k] + 3.90689059560852F, a[k] + other);
        }
        if (kPage * tile + step.g() + 8 * k > last) l[k] = -INFINITY;
      }
      const float mass_base = column_max(fmaxf(l[0], l[1]));
      const float centre_base = column_max(fmaxf(fmaxf(a[0], a[1]), fmaxf(second[0], second[1])));
      const std::uint32_t steps[2] = {steps_below(mass_base, l[0]), steps_below(mass_base, l[1])};
      const float sum = column_sum(exp2_fast(static_cast<float>(steps[0]) * (-1.0F / kLogSteps)) +
                                   exp2_fast(static_cast<float>(steps[1]) * (-1.0F / kLogSteps)));
      if (head < C::kHeads) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          step.scores()[(kPage * slot + step.g() + 8 * k) * C::kHeads + head] =
              steps[k] | steps_below(centre_base, a[k]) << 16;
          if constexpr (C::kMeans == 2) {
            step.second_centres()[(kPage * slot + step.g() + 8 * k) * C::kHeads + head] =
                static_cast<std::uint16_t>(steps_below(centre_base, second[k]));
          }
        }
        if (step.g() < C::kCluster) {
          put_float2<C::kCluster>(&step.tile_mass()[tile * C::kHeads + head], step.g(),
                                  make_float2(mass_base, sum));
        }
        if (step.g() == 0) step.tile_centre()[slot * C::kHeads + head] = centre_base;
      }
    }
    tile = next;
  }
}

/// Each head's log2 mass over all sealed pages, into norm.
template <class C>
__device__ void head_norms(const Step<C>& step) {
  const int tiles = (step.sealed() + kPage - 1) / kPage;
  // Padding heads get weights of 0.
  if (step.tid() < 8 && step.tid() >= step.args.group) step.s.norm[step.tid()] = 1e30F;
#pragma unroll 1
  for (int head = step.warp(); head < step.args.group; head += C::kWarps) {
    float base = -INFINITY;
#pragma unroll 1
    for (int i = step.lane(); i < tiles; i += 32) {
      base = fmaxf(base, step.tile_mass()[i * C::kHeads + head].x);
    }
    base = fmaxf(warp_max(base), -1e30F);
    float sum = 0;
#pragma unroll 1
    for (int i = step.lane(); i < tiles; i += 32) {
      const float2 mass = step.tile_mass()[i * C::kHeads + head];
      sum += mass.y * exp2_fast(mass.x - base);
    }
    sum = warp_sum(sum);
    if (step.lane() == 0) step.s.norm[head] = sum > 0 ? base + log2_fast(sum) : base;
  }
}

/// Ordering keys of this block's pages, to every block: 65535 is a share of 1, each step down a
/// factor of 2^(1/256). A block alone counts them as well.
template <class C>
__device__ void mass_keys(const Step<C>& step) {
  const int group = step.args.group;
  const int tiles = (step.sealed() + kPage - 1) / kPage;
  const int slots = (tiles - step.rank() + C::kCluster - 1) / C::kCluster;
  const float log_group = log2_fast(static_cast<float>(group));
  const PagePool pool = page_pool(step);
#pragma unroll 1
  for (int i = step.tid(); i < slots * kPage; i += C::kThreads) {
    const int tile = i / kPage * C::kCluster + step.rank();
    float x[C::kHeads];
    float top = -INFINITY;
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) {
      if (h < group) {
        const int at = i * C::kHeads + h;
        const std::uint32_t steps =
            C::kCentresAgain ? step.mass_scores()[at] : step.scores()[at] & 0xffffU;
        x[h] = step.tile_mass()[tile * C::kHeads + h].x - step.s.norm[h] -
               static_cast<float>(steps) * (1.0F / kLogSteps);
        top = fmaxf(top, x[h]);
      }
    }
    float sum = 0;
#pragma unroll
    for (int h = 0; h < C::kHeads; ++h) {
      if (h < group) sum += exp2_fast(x[h] - top);
    }
    const float score = top + log2_fast(sum) - log_group;
    const auto key = static_cast<std::uint16_t>(
        __float2uint_rn(fminf(fmaxf(65535.0F + kLogSteps * score, 0.0F), 65535.0F)));
    const int page = kPage * tile + i % kPage;
    if constexpr (C::kCluster == 1) {
      step.keys()[page] = key;
      if (page < step.sealed()) count_key(step, pool, page, key);
    } else {
      const std::uint32_t other = __shfl_down_sync(__activemask(), key, 1);
      if (i % 2 == 0) {
        auto* at = reinterpret_cast<std::uint32_t*>(&step.keys()[page]);
        for (int r = 0; r < C::kCluster; ++r) {
          put_u32<C::kCluster>(at, (step.rank() + r) % C::kCluster, key | other << 16);
        }
      }
    }
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_SCORE_CUH_
