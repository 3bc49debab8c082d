#ifndef TWILIGHT_BACKEND_CUDA_FAST_QUARTERS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_QUARTERS_CUH_

#include "backend/cuda/fast/score.cuh"
#include "backend/cuda/fast/stages.cuh"
#include "quant/index_format.h"

/// kSubCentroid summaries: four means a page, each of four tokens.
///
/// Rows of an int8 product are means, four to a page, so a product serves four pages and a page's
/// 256 bytes are read in one piece. A page's log2 mass is l = log2(4 sum 2^a_i) + v. Only masses
/// are kept of all pages (16 bits a head, see score.cuh): four centre products would take 32 KB of
/// shared memory per 1,024 pages and four heads. Candidates' products are made again from their
/// summaries, by the warp that estimates the page, four pages at a time.
namespace twilight::cuda_fast {

/// Means of four pages: row g is mean g % 4 of one page, row g + 8 of another.
template <class C>
struct MeanRows {
  Words<C::kSteps> codes[2];
  std::uint32_t scales[2];  ///< f16

  __device__ __forceinline__ void load(const Step<C>& step, int page0, int page1) {
    const int pages[2] = {page0, page1};
    const int mean = step.g() % 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      codes[k] = load_words<C::kSteps>(step.record(kSummaries, pages[k]) + mean * (C::kDim / 2) +
                                       step.t() * (4 * C::kSteps));
      scales[k] = load_stream2(step.record(kParams, pages[k]) + 2 * mean);
    }
  }
};

/// Sums of four values over the lanes g % 4 at once: value[i][k] of lane g goes to the lane of the
/// same g / 4 with g % 4 = i.
__device__ __forceinline__ void scatter_sums(const float (&value)[4][2], int g, float (&out)[2]) {
  const bool odd = (g & 1) != 0;
  const bool upper = (g & 2) != 0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sent = odd ? value[2 * i][k] : value[2 * i + 1][k];
      const float kept = odd ? value[2 * i + 1][k] : value[2 * i][k];
      pair[i] = kept + __shfl_xor_sync(kFullMask, sent, 4);
    }
    const float sent = upper ? pair[0] : pair[1];
    const float kept = upper ? pair[1] : pair[0];
    out[k] = kept + __shfl_xor_sync(kFullMask, sent, 8);
  }
}

/// Masses of a tile of 16 pages; products[s][k] is the centre product of mean g % 4 of page 8 (g /
/// 4) + 2 s + k. Lane g ends with pages 2 g and 2 g + 1.
template <class C>
__device__ __forceinline__ void store_tile_mass(const Step<C>& step, int tile, int head,
                                                const float (&products)[4][2], float spread,
                                                const float (&variance)[2]) {
  float top = products[0][0];
#pragma unroll
  for (int i = 1; i < 8; ++i) top = fmaxf(top, products[i / 2][i % 2]);
  top = column_max(top);
  // Under the tile's largest product with room above: pages down to 246 octaves below it count.
  const float shift = 120.0F - top;
  float terms[4][2];
#pragma unroll
  for (int i = 0; i < 8; ++i) terms[i / 2][i % 2] = exp2_fast(products[i / 2][i % 2] + shift);
  float l[2];
  scatter_sums(terms, step.g(), l);
  const int last = step.sealed() - 1;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    l[k] = log2_fast(l[k]) - shift + (spread * variance[k] + 2.0F);
    if (kPage * tile + 2 * step.g() + k > last) l[k] = -INFINITY;
  }
  const float base = column_max(fmaxf(l[0], l[1]));
  const std::uint32_t steps[2] = {steps_below(base, l[0]), steps_below(base, l[1])};
  const float sum = column_sum(exp2_fast(static_cast<float>(steps[0]) * (-1.0F / kLogSteps)) +
                               exp2_fast(static_cast<float>(steps[1]) * (-1.0F / kLogSteps)));
  if (head >= C::kHeads) return;
  const int slot = tile / C::kCluster;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    step.mass_scores()[(kPage * slot + 2 * step.g() + k) * C::kHeads + head] =
        static_cast<std::uint16_t>(steps[k]);
  }
  if (step.g() < C::kCluster) {
    put_float2<C::kCluster>(&step.tile_mass()[tile * C::kHeads + head], step.g(),
                            make_float2(base, sum));
  }
}

/// A warp's copies on their way: parts of a tile, four pages each, in order. With a tile's first
/// part go its scales (lanes 0 to 15) and the table entries of the warp's next tile (16 to 31);
/// what other lanes copied may be read after a __syncwarp. In registers parts were not that far
/// ahead: a loop waits for all of its loads at once, so that every part took a full latency.
template <class C>
struct SummaryRing {
  static constexpr int kLaneBytes = 4 * C::kSteps;
  static constexpr int kPartBytes = 2 * 32 * kLaneBytes;
  std::uint8_t* memory;  ///< [kRingParts][2][32 lanes], PageParams [2][kParamSlots], ids [2][16]
  const std::uint8_t* from;  ///< this lane's codes of page 0
  int slot = 0;

  __device__ explicit SummaryRing(const Step<C>& step)
      : memory(step.ring() + step.warp() * ring_bytes(C::kDim)),
        from(step.record(kSummaries, 0) + (step.g() % 4) * (C::kDim / 2) + step.t() * kLaneBytes) {
    whole_address(from);
  }
  /// Where this lane's codes of page k of its two are.
  [[nodiscard]] __device__ std::uint8_t* codes(const Step<C>& step, int k) const {
    return memory + slot * kPartBytes + (32 * k + step.lane()) * kLaneBytes;
  }
  /// Of the tile's first page; page i's lie i + i / 8 places on, so that halves of a tile meet no
  /// bank twice.
  [[nodiscard]] __device__ PageParams* params(int parity) const {
    return reinterpret_cast<PageParams*>(memory + kRingParts * kPartBytes) + parity * kParamSlots;
  }
  [[nodiscard]] __device__ std::int32_t* ids(int parity) const {
    return reinterpret_cast<std::int32_t*>(params(2)) + parity * kPage;
  }
  /// Part `part` of a tile; its ids have arrived.
  __device__ __forceinline__ void copy(const Step<C>& step, int part, int parity) {
    const auto* const pages =
        reinterpret_cast<const std::uint32_t*>(ids(parity)) + 8 * (step.g() / 4) + 2 * part;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      copy_lane<kLaneBytes>(codes(step, k), from + std::uint64_t{pages[k]} *
                                                       step.args.planes[kSummaries].page_stride);
    }
  }
  /// Scales of a tile whose ids have arrived, and the ids of the warp's next tile, the table's
  /// entries from `next` on. Entries behind the last sealed page stand for nothing: they repeat it.
  __device__ __forceinline__ void copy_params(const Step<C>& step, int next, int last, int parity) {
    const int entry = step.lane() % kPage;
    if (step.lane() < kPage) {
      copy_lane<16>(params(parity) + entry + entry / 8, step.record(kParams, ids(parity)[entry]));
    } else {
      copy_lane<4>(ids(parity ^ 1) + entry, step.table() + min(next + entry, last));
    }
  }
  __device__ __forceinline__ void advance() { slot = slot + 1 == kRingParts ? 0 : slot + 1; }
};

template <class C>
__device__ void score_by_quarters(const Step<C>& step, const FirstLoads<C>& first) {
  Fixed<C>& s = step.s;
  const int tiles = (step.sealed() + kPage - 1) / kPage;
  const int stride = C::kWarps * C::kCluster;
  int tile = step.warp() * C::kCluster + step.rank();
  const int last = step.sealed() - 1;
  SummaryRing<C> ring(step);
  if (tile < tiles) {
    if (step.lane() < kPage) {
      ring.ids(0)[step.lane()] =
          kPage * tile + step.lane() <= last ? first.pages[0] : step.table()[last];
    }
    __syncwarp();
#pragma unroll
    for (int part = 0; part < kRingParts; ++part) {
      ring.copy(step, part, 0);
      if (part == 0) ring.copy_params(step, kPage * (tile + stride), last, 0);
      commit_copies();
      ring.advance();
    }
  }
  prepare_query(step, first);
  cluster_sync<C::kCluster>();  // every block has started: its memory may be written from here on
  step.stamp(1);

  QueryCodes<C> q;
  q.load(step);
  float unit[C::kLaneHeads];
  float offset[C::kLaneHeads];
#pragma unroll
  for (int i = 0; i < C::kLaneHeads; ++i) {
    unit[i] = s.q_step[step.t() + 4 * i];
    offset[i] = 7.5F * s.q_sum[step.t() + 4 * i];
  }
  int parity = 0;
#pragma unroll 1
  for (; tile < tiles; tile += stride, parity ^= 1) {
    const bool more = tile + stride < tiles;
    float products[C::kLaneHeads][4][2];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      wait_copies<kRingParts - 1>();
      if (part < 2) __syncwarp();  // scales and ids are there; ids are read
      const PageParams* const params = ring.params(parity) + 9 * (step.g() / 4) + 2 * part;
      Words<C::kSteps> codes[2];
      float scales[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        codes[k] = shared_words<C::kSteps>(ring.codes(step, k));
        scales[k] = f16_pair(params[k].centre_scale[step.g() % 4]).x;
      }
#pragma unroll
      for (int i = 0; i < C::kLaneHeads; ++i) {
        float sums[2];
        nibble_products<C>(codes[0], codes[1], q, i, sums);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          products[i][part][k] = scales[k] * (unit[i] * sums[k] - offset[i]);
        }
      }
      const int ahead = part + kRingParts;
      if (ahead < 4) {
        ring.copy(step, ahead, parity);
      } else if (more) {
        ring.copy(step, ahead - 4, parity ^ 1);
        if (ahead == 4) ring.copy_params(step, kPage * (tile + 2 * stride), last, parity ^ 1);
      }
      commit_copies();
      ring.advance();
    }
    const PageParams* const params = ring.params(parity) + 2 * step.g() + step.g() / 4;
    const float variance[2] = {f16_pair(params[0].variance).x, f16_pair(params[1].variance).x};
#pragma unroll
    for (int i = 0; i < C::kLaneHeads; ++i) {
      const int head = step.t() + 4 * i;
      store_tile_mass(step, tile, head, products[i], s.q_spread[head], variance);
    }
  }
  wait_copies<0>();
}

/// Centre products, less norm, of the four candidates i, i + kWarps, ... that a warp estimates
/// together: lane (g, t) makes those of mean g % 4 of two of them.
template <class C>
struct CentreProducts {
  MeanRows<C> rows;
  float value[C::kLaneHeads][2];

  __device__ __forceinline__ void load(const Step<C>& step, int i) {
    const int end = step.owned_sealed() - 1;
    const int first = i + C::kWarps * (2 * (step.g() / 4));
    rows.load(step, step.physical()[min(first, end)], step.physical()[min(first + C::kWarps, end)]);
  }
  __device__ __forceinline__ void multiply(const Step<C>& step, const QueryCodes<C>& q) {
    const float scales[2] = {f16_pair(rows.scales[0]).x, f16_pair(rows.scales[1]).x};
#pragma unroll
    for (int set = 0; set < C::kLaneHeads; ++set) {
      const int head = step.t() + 4 * set;
      const float unit = step.s.q_step[head];
      const float offset = 7.5F * step.s.q_sum[head];
      float sums[2];
      nibble_products<C>(rows.codes[0], rows.codes[1], q, set, sums);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        value[set][k] = scales[k] * (unit * sums[k] - offset) - step.s.norm[head];
      }
    }
  }
  /// Of page i + kWarps k: for the means of tokens g and g + 8.
  __device__ __forceinline__ float2 of(const Step<C>& step, int set, int k) const {
    const int from = 16 * (k / 2) + 4 * (step.g() / 4) + step.t();
    return make_float2(__shfl_sync(kFullMask, value[set][k % 2], from),
                       __shfl_sync(kFullMask, value[set][k % 2], from + 8));
  }
};

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_QUARTERS_CUH_
