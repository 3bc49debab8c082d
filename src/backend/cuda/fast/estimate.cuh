#ifndef TWILIGHT_BACKEND_CUDA_FAST_ESTIMATE_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_ESTIMATE_CUH_

#include "backend/cuda/fast/prune.cuh"
#include "backend/cuda/fast/quarters.cuh"
#include "backend/cuda/fast/quest.cuh"
#include "backend/cuda/fast/score.cuh"

/// Estimated token weights of this block's candidate pages: 2^(estimate - norm) in bf16,
/// [owned page, g, head] pairs of tokens g and g + 8, and each page's sums. One warp a page, two
/// pages in flight and two loading. Page sums add in an order of their own, head sums in the order
/// of candidates, so neither depends on the launch shape.
namespace twilight::cuda_fast {

template <class C>
struct EstimateRecord {
  Words<C::kSteps> codes[C::kPaper ? 2 : 1];
  uint2 scales;

  __device__ __forceinline__ void load(const Step<C>& step, const std::uint8_t* codes_at,
                                       const std::uint8_t* scales_at, int i) {
    const auto offset = static_cast<std::uint64_t>(static_cast<std::uint32_t>(step.physical()[i])) *
                        step.args.planes[kEstimates].page_stride;
    const std::uint8_t* at = codes_at + offset;
    if constexpr (C::kPaper) {
      if constexpr (C::kSteps == 4) {
        codes[0] = load_words<4>(at);
        codes[1] = load_words<4>(at + 512);
      } else {
        const uint4 v = load_stream16(at);
        codes[0].w[0] = v.x, codes[0].w[1] = v.y;
        codes[1].w[0] = v.z, codes[1].w[1] = v.w;
      }
      scales = load_stream8(scales_at + offset);
    } else {
      codes[0] = load_words<C::kSteps>(at);
      scales.x = load_stream4(scales_at + offset);
    }
  }
};

/// What a lane needs of its heads.
template <class C>
struct EstimateHeads {
  float unit[C::kLaneHeads];
  float offset[C::kLaneHeads];
  float norm[C::kLaneHeads];     ///< 4 bits; centres of 2-bit pages are relative to it already
  float largest[C::kLaneHeads];  ///< estimate less norm
  float* sums;                   ///< of this block's first page

  __device__ void load(const Step<C>& step) {
    sums = step.page_sums() + step.begin() * C::kHeads;
#pragma unroll
    for (int i = 0; i < C::kLaneHeads; ++i) {
      const int head = step.t() + 4 * i;
      unit[i] = step.s.q_step[head];
      // Products of 2 bits come with 1.5 * 2^23 added, see estimate_page.
      offset[i] =
          C::kPaper ? step.s.q_sum[head] : fmaf(12582912.0F, unit[i], 1.5F * step.s.q_sum[head]);
      norm[i] = step.s.norm[head];
      largest[i] = -INFINITY;
    }
  }
};

/// Stores the weights of tokens g and g + 8 of owned page i under a head, and their sum.
template <class C>
__device__ __forceinline__ void store_weights(const Step<C>& step, float* sums, int i, int head,
                                              float w0, float w1) {
  const std::uint32_t pair = pack_pair<Bf16>(w0, w1);
  const float2 rounded = unpack_pair<Bf16>(pair);
  const float sum = column_sum(rounded.x + rounded.y);
  if (head >= C::kHeads) return;
  step.weights()[(i * 8 + step.g()) * C::kHeads + head] = pair;
  if (step.g() < C::kCluster) {
    put_float<C::kCluster>(sums + i * C::kHeads + head, step.g(), sum);
  }
}

/// `centres` gives the centre products of tokens g and g + 8, less norm, for a head set (2 bits).
template <class C, typename Centres>
__device__ __forceinline__ void estimate_page(const Step<C>& step, const EstimateRecord<C>& record,
                                              const QueryCodes<C>& q, EstimateHeads<C>& heads,
                                              int i, const Centres& centres) {
#pragma unroll
  for (int set = 0; set < C::kLaneHeads; ++set) {
    const int head = step.t() + 4 * set;
    float product[2];
    if constexpr (C::kPaper) {
      int c0 = 0;
      int c1 = 0;
      int c2 = 0;
      int c3 = 0;
#pragma unroll
      for (int j = 0; j < C::kSteps; ++j) {
        // Two words a step: halves 0 and 1 of the step's channels.
        const int at = 2 * j;
        const std::uint32_t h0 = record.codes[at / C::kSteps].w[at % C::kSteps];
        const std::uint32_t h1 = record.codes[(at + 1) / C::kSteps].w[(at + 1) % C::kSteps];
        mma_u8s8(c0, c1, c2, c3, h0 & 0x0f0f0f0fU, (h0 >> 4) & 0x0f0f0f0fU, h1 & 0x0f0f0f0fU,
                 (h1 >> 4) & 0x0f0f0f0fU, q.b[set][2 * j], q.b[set][2 * j + 1]);
      }
      product[0] = static_cast<float>(128 * c0 + c1);
      product[1] = static_cast<float>(128 * c2 + c3);
    } else {
      // The low sum starts at the bits of 1.5 * 2^23: 128 * high + low is then a float's mantissa.
      // Codes of tokens g + 8 stay shifted by two bits, so their product is four times as large.
      int c0 = 0;
      int c1 = 0x4b400000;
      int c2 = 0;
      int c3 = 0x4b400000;
#pragma unroll
      for (int j = 0; j < C::kSteps; ++j) {
        const std::uint32_t w = record.codes[0].w[j];
        const std::uint32_t v = w >> 4;
        mma_u8s8(c0, c1, c2, c3, w & 0x03030303U, w & 0x0c0c0c0cU, v & 0x03030303U, v & 0x0c0c0c0cU,
                 q.b[set][2 * j], q.b[set][2 * j + 1]);
      }
      product[0] = __int_as_float(128 * c0 + c1);
      product[1] = __int_as_float(128 * c2 + c3);
    }
    float e[2];
    if constexpr (C::kPaper) {
      const float2 first = f16_pair(record.scales.x);
      const float2 second = f16_pair(record.scales.y);
      e[0] = first.x * (heads.unit[set] * product[0]) +
             (first.y * heads.offset[set] - heads.norm[set]);
      e[1] = second.x * (heads.unit[set] * product[1]) +
             (second.y * heads.offset[set] - heads.norm[set]);
    } else {
      const float2 scale = f16_pair(record.scales.x);
      const float2 centre = centres(set);
      const float unit = heads.unit[set];
      // 4 x + 1.5 * 2^23 over 4 lacks three quarters of 1.5 * 2^23.
      e[0] = fmaf(scale.x, fmaf(unit, product[0], -heads.offset[set]), centre.x);
      e[1] = fmaf(scale.y, fmaf(0.25F * unit, product[1], 9437184.0F * unit - heads.offset[set]),
                  centre.y);
    }
    heads.largest[set] = fmaxf(heads.largest[set], fmaxf(e[0], e[1]));
    store_weights(step, heads.sums, i, head, exp2_fast(e[0]), exp2_fast(e[1]));
  }
}

/// Centre products that the score phase left of owned page i. Of two means tokens g + 8 have the
/// second.
template <class C>
__device__ __forceinline__ float2 kept_centres(const Step<C>& step, int i, int set) {
  const int head = step.t() + 4 * set;
  const float* at = step.page_values() + i * C::kMeans * C::kHeads + (head < C::kHeads ? head : 0);
  return make_float2(at[0], at[C::kMeans > 1 ? C::kHeads : 0]);
}

/// Exact weights of the open page, owned page i, by one warp.
template <class C>
__device__ void estimate_open_page(const Step<C>& step, int i, EstimateHeads<C>& heads) {
  const StepArgs& args = step.args;
  const int tokens = step.n() % kPage;
  float sums = 0;
  const int head = C::kHeads == 8 ? step.g() : step.g() % 4;
  const bool real = head < args.group;
  const float norm = real ? step.s.norm[head] : 0.0F;
  float largest = -INFINITY;
  for (int half = 0; half < 2; ++half) {
    const int slot = min(8 * half + step.g(), tokens - 1);
    const std::uint8_t* row = step.record(kKeys, step.physical()[i]) +
                              static_cast<std::int64_t>(slot) * args.k_token_stride + 16 * step.t();
    uint4 x[C::kDim / 32];
#pragma unroll
    for (int k = 0; k < C::kDim / 32; ++k) x[k] = load_stream16(row + 64 * k);
    float acc[4] = {};
    row_products<C, typename C::Element>(acc, step.s.q_rows, x, step.g(), step.t());
    const float2 products = whole_products<C>(acc);
    const float e[2] = {products.x, products.y};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int token = 8 * half + 2 * step.t() + k;
      const bool exists = token < tokens && real;
      if (exists) largest = fmaxf(largest, e[k] - norm);
      const Bf16 weight = __float2bfloat16_rn(exists ? exp2_fast(e[k] - norm) : 0.0F);
      sums += __bfloat162float(weight);
      if (head < C::kHeads && (C::kHeads == 8 || step.g() < 4)) {
        reinterpret_cast<Bf16*>(
            step.weights())[2 * ((i * 8 + token % 8) * C::kHeads + head) + half] = weight;
      }
    }
  }
  sums += __shfl_xor_sync(kFullMask, sums, 1);
  sums += __shfl_xor_sync(kFullMask, sums, 2);
  largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
  if (head < C::kHeads && step.t() == 0 && (C::kHeads == 8 || step.g() < 4)) {
    for (int r = 0; r < C::kCluster; ++r) {
      put_float<C::kCluster>(&step.page_sums()[(step.begin() + i) * C::kHeads + head], r, sums);
    }
  }
#pragma unroll
  for (int set = 0; set < C::kLaneHeads; ++set) {
    const float other = __shfl_sync(kFullMask, largest, 4 * (step.t() + 4 * set));
    heads.largest[set] = fmaxf(heads.largest[set], other);
  }
}

template <class C>
__device__ void estimate_weights(const Step<C>& step, EstimateHeads<C>& heads) {
  QueryCodes<C> q;
  q.load(step);
  heads.load(step);
  const std::uint8_t* codes_at = step.plane(kEstimates);
  const std::uint8_t* scales_at =
      codes_at + (C::kPaper ? 256 * C::kSteps + 8 * step.g() : 128 * C::kSteps + 4 * step.g());
  codes_at += C::kPaper ? 16 * step.lane() : 4 * C::kSteps * step.lane();
  const int count = step.owned_sealed();
  constexpr int kW = C::kWarps;
  int i = step.warp();
  if (i < count) {
    const int end = count - 1;
    EstimateRecord<C> a[2];
    EstimateRecord<C> b[2];
    std::conditional_t<C::kCentresAgain, CentreProducts<C>, int> again;
    const auto estimate = [&](const EstimateRecord<C>& record, int k) {
      estimate_page(step, record, q, heads, i + k * kW, [&](int set) {
        if constexpr (C::kCentresAgain) {
          return again.of(step, set, k);
        } else {
          return kept_centres(step, i + k * kW, set);
        }
      });
    };
    if constexpr (C::kCentresAgain) again.load(step, i);
    a[0].load(step, codes_at, scales_at, i);
    a[1].load(step, codes_at, scales_at, min(i + kW, end));
    b[0].load(step, codes_at, scales_at, min(i + 2 * kW, end));
    b[1].load(step, codes_at, scales_at, min(i + 3 * kW, end));
    while (true) {
      if constexpr (C::kCentresAgain) again.multiply(step, q);
      estimate(a[0], 0);
      if (i + kW < count) estimate(a[1], 1);
      if (i + 2 * kW >= count) break;
      a[0].load(step, codes_at, scales_at, min(i + 4 * kW, end));
      a[1].load(step, codes_at, scales_at, min(i + 5 * kW, end));
      // Half a round ahead of their use; with eight heads that would spill what they replace.
      if constexpr (C::kCentresAgain && C::kLaneHeads == 1) again.load(step, i + 4 * kW);
      estimate(b[0], 2);
      if (i + 3 * kW < count) estimate(b[1], 3);
      if (i + 4 * kW >= count) break;
      b[0].load(step, codes_at, scales_at, min(i + 6 * kW, end));
      b[1].load(step, codes_at, scales_at, min(i + 7 * kW, end));
      if constexpr (C::kCentresAgain && C::kLaneHeads > 1) again.load(step, i + 4 * kW);
      i += 4 * kW;
    }
  }
  if (step.owned() > step.owned_sealed() && step.warp() == kW - 1) {
    estimate_open_page(step, step.owned_sealed(), heads);
  }
}

/// Weights under a shift that keeps them in range, and head_sum, head_max, norm to match.
template <class C>
__device__ void estimate(const Step<C>& step) {
  Fixed<C>& s = step.s;
  clear_prune_bins(step);
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    EstimateHeads<C> heads;
    estimate_weights(step, heads);
#pragma unroll
    for (int set = 0; set < C::kLaneHeads; ++set) {
      const float largest = column_max(heads.largest[set]);
      if (step.g() == 0) s.reduce[step.warp()][step.t() + 4 * set].x = largest;
    }
    __syncthreads();
    if (step.warp() < C::kHeads) {
      const float largest =
          warp_max(step.lane() < C::kWarps ? s.reduce[step.lane()][step.warp()].x : -INFINITY);
      if (step.lane() < C::kCluster) {
        put_float<C::kCluster>(&s.estimate_max[step.rank()][step.warp()], step.lane(), largest);
      }
    }
    cluster_sync<C::kCluster>();
#pragma unroll 1
    for (int head = step.warp(); head < C::kHeads; head += C::kWarps) {
      float sum = 0;
#pragma unroll 1
      for (int i = step.lane(); i < step.candidates(); i += 32) {
        sum += step.page_sums()[i * C::kHeads + head];
      }
      sum = warp_sum(sum);
      float largest = -INFINITY;
      for (int r = 0; r < C::kCluster; ++r) largest = fmaxf(largest, s.estimate_max[r][head]);
      if (step.lane() == 0) {
        s.head_sum[head] = sum;
        s.head_max[head] = largest + s.norm[head];
      }
    }
    __syncthreads();
    bool fits = true;
    for (int head = 0; head < step.args.group; ++head) {
      const float sum = s.head_sum[head];
      fits = fits && sum > 0x1p-80F && sum < 0x1p60F;
    }
    if (fits || attempt == 1) break;
    // The page model was far off: shift by the largest estimate instead.
    cluster_sync<C::kCluster>();
    if constexpr (!C::kPaper && !C::kCentresAgain) {
#pragma unroll 1
      for (int i = step.tid(); i < step.owned_sealed() * C::kMeans * C::kHeads; i += C::kThreads) {
        const int head = i % C::kHeads;
        if (head < step.args.group) step.page_values()[i] += s.norm[head] - s.head_max[head];
      }
      __syncthreads();
    }
    if (step.tid() < step.args.group) s.norm[step.tid()] = s.head_max[step.tid()];
    __syncthreads();
  }
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_ESTIMATE_CUH_
