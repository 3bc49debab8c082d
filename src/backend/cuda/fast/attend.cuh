#ifndef TWILIGHT_BACKEND_CUDA_FAST_ATTEND_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_ATTEND_CUH_

#include "backend/cuda/fast/quest.cuh"
#include "backend/cuda/fast/step_state.cuh"

/// Exact attention over this block's kept rows and its pages' tails.
///
/// Kept rows go in chunks of kChunk: scores of a chunk into shared memory (one warp, 8 rows), the
/// shift of each head from their maximum, then values (one warp, 16 rows by 64 channels). So the
/// shift is exact, weights are at most 1, and a later chunk rescales what came before. Tails join
/// under the same shift. Partial outputs add in warp order, then in block order.
namespace twilight::cuda_fast {

/// A warp's accumulators: 64 channels by 8 columns. Channel 8 g + 2 i + k of column 2 t + c is
/// o[i][2 k + c].
struct ValueSums {
  float o[4][4] = {};
};

/// Scores of rows [first, first + count) of the list into chunk_scores; maxima into reduce.
template <class C>
__device__ void score_rows(const Step<C>& step, int first, int count) {
  const int tiles = (count + 7) / 8;
  const int head = C::kHeads == 8 ? step.g() : step.g() % 4;
  const bool writes = head < C::kHeads && (C::kHeads == 8 || step.g() < 4);
  float largest = -INFINITY;
  constexpr int kChunks = C::kDim / 32;
  const auto load = [&](int tile, uint4(&x)[kChunks]) {
    const std::uint32_t row = step.rows()[first + min(8 * tile + step.g(), count - 1)];
    const std::uint8_t* at =
        row_address(step, kKeys, step.args.k_token_stride, row) + 16 * step.t();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) x[i] = load_stream16(at + 64 * i);
    // The values come next.
    if (step.t() < C::kDim / 64) {
      prefetch_line(row_address(step, kValues, step.args.v_token_stride, row) + 128 * step.t());
    }
  };
  const auto finish = [&](int tile, const uint4(&x)[kChunks]) {
    float acc[4] = {};
    row_products<C, typename C::Element>(acc, step.s.q_rows, x, step.g(), step.t());
    const float2 products = whole_products<C>(acc);
    const int token = 8 * tile + 2 * step.t();
    largest = fmaxf(largest, fmaxf(products.x, products.y));
    if (writes) {
      step.chunk_scores()[token * C::kHeads + head] = products.x;
      step.chunk_scores()[(token + 1) * C::kHeads + head] = products.y;
    }
  };
  int tile = step.warp();
  if (tile < tiles) {
    uint4 a[kChunks];
    uint4 b[kChunks];
    load(tile, a);
    load(min(tile + C::kWarps, tiles - 1), b);
    while (true) {
      finish(tile, a);
      if (tile + C::kWarps >= tiles) break;
      load(min(tile + 2 * C::kWarps, tiles - 1), a);
      finish(tile + C::kWarps, b);
      if (tile + 2 * C::kWarps >= tiles) break;
      load(min(tile + 3 * C::kWarps, tiles - 1), b);
      tile += 2 * C::kWarps;
    }
  }
  largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
  if (step.t() == 0 && (C::kHeads == 8 || step.g() < 4))
    step.s.reduce[step.warp()][head].x = largest;
}

/// Adds the weighted values of the chunk; returns this lane's part of column g's normaliser.
template <class C>
__device__ float add_values(const Step<C>& step, int first, int count, ValueSums& sums) {
  const int tiles = (count + 15) / 16;
  const int half = step.warp() % C::kHalves;
  const int head = C::kHeads == 8 ? step.g() : step.g() % C::kHeads;
  const float top = step.s.top[head];
  float total = 0;
  const auto load = [&](int tile, uint4(&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int token = min(16 * tile + 2 * step.t() + (k & 1) + 8 * (k >> 1), count - 1);
      const std::uint32_t row = step.rows()[first + token];
      x[k] = load_stream16(row_address(step, kValues, step.args.v_token_stride, row) + 128 * half +
                           16 * step.g());
    }
  };
  const auto finish = [&](int tile, const uint4(&x)[4]) {
    using Element = typename C::Element;
    std::uint32_t p[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int token = 16 * tile + 2 * step.t() + 8 * k;
      float w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float score = step.chunk_scores()[(token + i) * C::kHeads + head];
        w[i] = token + i < count ? exp2_fast(score - top) : 0.0F;
      }
      p[k] = pack_pair<Element>(w[0], w[1]);
      const float2 rounded = unpack_pair<Element>(p[k]);
      total += rounded.x + rounded.y;
    }
    const std::uint32_t w[4][4] = {{x[0].x, x[0].y, x[0].z, x[0].w},
                                   {x[1].x, x[1].y, x[1].z, x[1].w},
                                   {x[2].x, x[2].y, x[2].z, x[2].w},
                                   {x[3].x, x[3].y, x[3].z, x[3].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mma_16<Element>(sums.o[i], __byte_perm(w[0][i], w[1][i], 0x5410),
                      __byte_perm(w[0][i], w[1][i], 0x7632), __byte_perm(w[2][i], w[3][i], 0x5410),
                      __byte_perm(w[2][i], w[3][i], 0x7632), p[0], p[1]);
    }
  };
  constexpr int kStride = C::kValueGroups;
#pragma unroll 1
  for (int tile = step.warp() / C::kHalves; tile < tiles; tile += kStride) {
    uint4 x[4];
    load(tile, x);
    finish(tile, x);
  }
  return total;
}

/// Adds dropped weights times value means: 16 pages a product, codes as bf16 numbers 128 + code.
/// Returns this lane's part of column g's normaliser.
template <class C>
__device__ float add_tails(const Step<C>& step, ValueSums& sums) {
  const int count = step.owned_sealed();
  const int tiles = (count + 15) / 16;
  const int half = step.warp() % C::kHalves;
  const int head = C::kHeads == 8 ? step.g() : step.g() % C::kHeads;
  const float gain = exp2_fast(step.s.norm[head] - step.s.top[head]);
  float total = 0;
  float scaled = 0;
#pragma unroll 1
  for (int tile = step.warp() / C::kHalves; tile < tiles; tile += C::kValueGroups) {
    const auto number_of = [&](int k) { return 16 * tile + 2 * step.t() + (k & 1) + 8 * (k >> 1); };
    const auto page_of = [&](int k) { return step.physical()[min(number_of(k), count - 1)]; };
    const auto code_of = [&](int k) {
      return load_stream4(step.record(kValueMeans, page_of(k)) + 32 * half + 4 * step.g());
    };
    // Four words, since the compiler stores an array of them as well.
    const std::uint32_t code0 = code_of(0);
    const std::uint32_t code1 = code_of(1);
    const std::uint32_t code2 = code_of(2);
    const std::uint32_t code3 = code_of(3);
    float scale[4];
    float mass[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = number_of(k);
      scale[k] = __half2float(__ushort_as_half(
          __ldg(reinterpret_cast<const unsigned short*>(step.record(kParams, page_of(k)) + 10))));
      mass[k] = i < count ? step.page_values()[i * C::kHeads + head] * gain : 0.0F;
    }
    std::uint32_t m[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      total += mass[2 * k] + mass[2 * k + 1];
      m[k] = pack_pair<Bf16>(mass[2 * k] * scale[2 * k], mass[2 * k + 1] * scale[2 * k + 1]);
      const float2 rounded = unpack_pair<Bf16>(m[k]);
      scaled += rounded.x + rounded.y;
    }
    // Halves of a pair of pages' words; nibble n of a half is channel 4 (n & 1) + n / 2, + 2 in the
    // upper half.
    const std::uint32_t pair[2][2] = {
        {__byte_perm(code0, code1, 0x5410), __byte_perm(code0, code1, 0x7632)},
        {__byte_perm(code2, code3, 0x5410), __byte_perm(code2, code3, 0x7632)}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int upper = i & 1;
      const int shift = 4 * (i >> 1);
      const std::uint32_t first = pair[0][upper] >> shift;
      const std::uint32_t second = pair[1][upper] >> shift;
      const auto number = [](std::uint32_t word) { return (word & 0x000f000fU) | 0x43004300U; };
      mma_16<Bf16>(sums.o[i], number(first), number(first >> 8), number(second),
                   number(second >> 8), m[0], m[1]);
    }
  }
  scaled += __shfl_xor_sync(kFullMask, scaled, 1);
  scaled += __shfl_xor_sync(kFullMask, scaled, 2);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float offset = 135.5F * __shfl_sync(kFullMask, scaled, 4 * (2 * step.t() + c));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums.o[i][c] -= offset;
      sums.o[i][2 + c] -= offset;
    }
  }
  return total;
}

/// Partial outputs lie as [value group, head, channel], a row's normaliser at its end.
template <class C>
inline constexpr int kPartialRow = C::kDim + 4;

/// A warp's sums into its partials; `add`: on top of an earlier chunk's, rescaled.
template <class C>
__device__ __forceinline__ void store_sums(const Step<C>& step, const ValueSums& sums, bool add) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int head = 2 * step.t() + c;
    if (head >= C::kHeads) continue;
    float* out = step.partials() + (step.warp() / C::kHalves * C::kHeads + head) * kPartialRow<C> +
                 64 * (step.warp() % C::kHalves) + 8 * step.g();
    const float rescale = add ? step.s.rescale[head] : 0.0F;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float4 x =
          make_float4(sums.o[i][c], sums.o[i][2 + c], sums.o[i + 1][c], sums.o[i + 1][2 + c]);
      auto* at = reinterpret_cast<float4*>(out + 2 * i);
      if (add) {
        const float4 y = *at;
        x = make_float4(x.x + y.x * rescale, x.y + y.y * rescale, x.z + y.z * rescale,
                        x.w + y.w * rescale);
      }
      *at = x;
    }
  }
}

/// Attention of the whole problem, written by its blocks together.
template <class C>
__device__ void attend(const Step<C>& step, int kept) {
  Fixed<C>& s = step.s;
  const StepArgs& args = step.args;
  float total = 0;
  if (step.tid() < 8) {
    // Tails can weigh no more than the row's estimates do.
    s.top[step.tid()] = args.tail && step.tid() < args.group && s.head_sum[step.tid()] > 0
                            ? s.norm[step.tid()] + log2_fast(s.head_sum[step.tid()])
                            : -1e30F;
  }
  __syncthreads();
  int first = 0;
#pragma unroll 1
  do {
    const int count = min(kChunk, kept - first);
    score_rows(step, first, count);
    __syncthreads();
    if (step.warp() < C::kHeads) {
      const float largest =
          warp_max(step.lane() < C::kWarps ? s.reduce[step.lane()][step.warp()].x : -INFINITY);
      if (step.lane() == 0) {
        const float before = s.top[step.warp()];
        const float after = fmaxf(before, largest);
        s.top[step.warp()] = after;
        s.rescale[step.warp()] = exp2_fast(before - after);
      }
    }
    __syncthreads();
    step.stamp(7);
    ValueSums sums;
    if (first > 0) total *= s.rescale[C::kHeads == 8 ? step.g() : step.g() % C::kHeads];
    total += add_values(step, first, count, sums);
    step.stamp(8);
    if (args.tail && first + kChunk >= kept) total += add_tails(step, sums);
    store_sums(step, sums, first > 0);
    first += kChunk;
    if (first < kept) __syncthreads();
  } while (first < kept);
  total += __shfl_xor_sync(kFullMask, total, 1);
  total += __shfl_xor_sync(kFullMask, total, 2);
  constexpr int kRow = kPartialRow<C>;
  float* partials = step.partials();
  if (step.t() == 0 && step.warp() % C::kHalves == 0 && step.g() < C::kHeads) {
    partials[(step.warp() / C::kHalves * C::kHeads + step.g()) * kRow + C::kDim] = total;
  }
  __syncthreads();
  step.stamp(9);

  const std::int64_t out_row = step.seq() * args.out_seq_stride +
                               static_cast<std::int64_t>(step.kv_head()) * args.group * C::kDim;
  const int outputs = args.group * C::kDim;
  if constexpr (C::kCluster == 1) {
#pragma unroll 1
    for (int i = step.tid(); i < outputs; i += C::kThreads) {
      const int head = i / C::kDim;
      float sum = 0;
      float norm = 0;
#pragma unroll
      for (int k = 0; k < C::kValueGroups; ++k) {
        const float* row = partials + (k * C::kHeads + head) * kRow;
        sum += row[i % C::kDim];
        norm += row[C::kDim];
      }
      args.out[out_row + i] = norm != 0 ? sum / norm : 0.0F;
    }
  } else {
    // Block r finishes a slice of the outputs: everybody sends it sums, normalisers and shifts.
    const int slice = (outputs + C::kCluster - 1) / C::kCluster;
    float* inbox = partials + C::kValueGroups * C::kHeads * kRow;  // [from, slice]
    const int slice_capacity = (C::kHeads * C::kDim + C::kCluster - 1) / C::kCluster;
#pragma unroll 1
    for (int i = step.tid(); i < outputs; i += C::kThreads) {
      const int head = i / C::kDim;
      float sum = 0;
      for (int k = 0; k < C::kValueGroups; ++k) {
        sum += partials[(k * C::kHeads + head) * kRow + i % C::kDim];
      }
      put_float<C::kCluster>(inbox + step.rank() * slice_capacity + i % slice, i / slice, sum);
    }
    if (step.tid() < C::kHeads * C::kCluster) {
      const int head = step.tid() % C::kHeads;
      float norm = 0;
      for (int k = 0; k < C::kValueGroups; ++k) {
        norm += partials[(k * C::kHeads + head) * kRow + C::kDim];
      }
      put_float<C::kCluster>(&s.remote[step.rank()][head][0], step.tid() / C::kHeads, norm);
      put_float<C::kCluster>(&s.remote[step.rank()][head][1], step.tid() / C::kHeads, s.top[head]);
    }
    cluster_sync<C::kCluster>();
    const int begin = step.rank() * slice;
#pragma unroll 1
    for (int i = step.tid(); i < slice && begin + i < outputs; i += C::kThreads) {
      const int head = (begin + i) / C::kDim;
      float top = -INFINITY;
      for (int r = 0; r < C::kCluster; ++r) top = fmaxf(top, s.remote[r][head][1]);
      float sum = 0;
      float norm = 0;
      for (int r = 0; r < C::kCluster; ++r) {
        const float gain = exp2_fast(s.remote[r][head][1] - top);
        sum += inbox[r * slice_capacity + i] * gain;
        norm += s.remote[r][head][0] * gain;
      }
      args.out[out_row + begin + i] = norm != 0 ? sum / norm : 0.0F;
    }
  }
}

/// Kept mass of each head, for statistics; after attend.
template <class C>
__device__ void write_head_mass(const Step<C>& step) {
  const StepArgs& args = step.args;
  const Fixed<C>& s = step.s;
  if (args.head_mass == nullptr || step.rank() != 0 || step.tid() >= args.group) return;
  float dropped = 0;
  for (int r = 0; r < C::kCluster; ++r) dropped += s.dropped_mass[r][step.tid()];
  const float all = s.head_sum[step.tid()];
  args.head_mass[step.problem() * args.group + step.tid()] =
      all > 0 ? fminf(fmaxf(1.0F - dropped / all, 0.0F), 1.0F) : 0.0F;
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_ATTEND_CUH_
