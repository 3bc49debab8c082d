#include "backend/cuda/fast/sample.h"

#include <cfloat>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/fast/dependent.cuh"
#include "backend/cuda/fast/sample_bins.cuh"

// A token of each row of logits, without sorting them. A cluster of 8 blocks (before sm_90 one
// block) takes a row, each block a piece of it. Weights are integers, 2^unit_bits for the largest,
// so sums depend on no order. One histogram of masses over the distance from the largest logit, in
// steps of temperature / 64, then up to three searches in it: the top_k-th logit by count, the
// nucleus' last one by mass, the token by mass. A search finds the bin on its boundary, gathers the
// bin's few logits in one block and ranks them there; where they are many (ties, high
// temperatures), it goes down the digits of (logit, number) instead. Bound by the f64 exponentials
// and the latency of about ten cluster barriers. Tests: tests/cuda/sample_cuda_test.cc.
namespace twilight::cuda_fast {
namespace {

/// A search among the items of one bin, 8 bits of their keys at a time. Leaves `found` in every
/// block.
template <int kBlocks>
__device__ __noinline__ void find_by_digits(Shared& s, Place before, bool by_count, Mass wanted) {
  const Piece& piece = s.piece;
  const auto begin = static_cast<float>(before.at);
  Key prefix = 0;
  Mass mass_to = 0;
#pragma unroll 1
  for (int shift = 56; shift >= 0; shift -= 8) {
    clear<kBlocks>(s.own);
    __syncthreads();
    piece.for_all<kBlocks>([&](std::uint32_t i, float logit, bool there) {
      const Key key = piece.key(i, logit);
      const bool in =
          there && piece.in_bin(logit, begin) && (shift == 56 || key >> (shift + 8) == prefix);
      const int digit = static_cast<int>(key >> shift & (kDigits - 1));
      add(s.own, in ? kDigits - 1 - digit : -1, in ? piece.mass(logit) : 0, by_count);
    });
    sum_up<kBlocks>(s, s.digits);
    const Mass left = wanted - (by_count ? Mass{before.count} : before.mass);
    const Place inner = bin_of<kBlocks>(s, s.digits, by_count, left);
    prefix = prefix << 8 | (kDigits - 1 - inner.at);
    mass_to = before.mass + s.digits.mass[inner.at];
    before.mass += inner.mass;
    before.count += inner.count;
  }
  if (threadIdx.x == 0) s.found = {mass_to, 0, ~static_cast<std::uint32_t>(prefix)};
}

/// The item with which the sum in order first reaches `wanted`, and the mass up to it and with it.
template <int kBlocks>
__device__ Place find(Shared& s, int search, bool by_count, Mass wanted) {
  const Piece piece = s.piece;
  const Place before = bin_of<kBlocks>(s, s.row, by_count, wanted);
  const auto begin = static_cast<float>(before.at);
  piece.for_all<kBlocks>([&](std::uint32_t i, float logit, bool there) {
    if (!there || !piece.in_bin(logit, begin)) return;
    const std::uint32_t at = atomicAdd(in_block<kBlocks>(&s.listed[search], 0), 1U);
    if (at >= kList) return;
    *in_block<kBlocks>(&s.list_key[at], 0) = piece.key(i, logit);
    *in_block<kBlocks>(&s.list_mass[at], 0) = piece.mass(logit);
  });
  cluster_sync<kBlocks>();
  const auto listed = static_cast<int>(*in_block<kBlocks>(&s.listed[search], 0));
  if (listed > kList) {
    find_by_digits<kBlocks>(s, before, by_count, wanted);
  } else if (cluster_rank<kBlocks>() == 0) {
    for (int i = threadIdx.x; i < listed; i += kThreadsOf<kBlocks>) {
      const Key mine = s.list_key[i];
      Mass mass = before.mass;
      std::uint32_t count = before.count;
#pragma unroll 4
      for (int j = 0; j < listed; ++j) {
        const bool earlier = s.list_key[j] > mine;
        mass += earlier ? s.list_mass[j] : 0;
        count += earlier ? 1U : 0U;
      }
      const Mass mass_to = mass + s.list_mass[i];
      const bool is = by_count ? count + 1U == wanted : mass < wanted && wanted <= mass_to;
      if (!is) continue;
      for (int r = 0; r < kBlocks; ++r) {
        *in_block<kBlocks>(&s.found, r) = {mass_to, count + 1U, ~static_cast<std::uint32_t>(mine)};
      }
    }
  }
  cluster_sync<kBlocks>();
  return s.found;
}

/// Key of the row's largest logit, all ones where there is a NaN, in every thread.
template <int kBlocks>
__device__ Key largest(Shared& s) {
  const Piece piece = s.piece;
  Key best = 0;
  piece.for_all<kBlocks>([&](std::uint32_t i, float logit, bool there) {
    const Key key = logit != logit ? ~Key{0} : piece.key(i, logit);
    if (there && key > best) best = key;
  });
  const auto larger = [](Key a, Key b) { return a > b ? a : b; };
  best = warp_reduce(best, larger);
  if (threadIdx.x % 32 == 0) s.warp_mass[threadIdx.x / 32] = best;
  cluster_sync<kBlocks>();  // the others may only be written to once they run
  if (threadIdx.x < kBlocks) {
    for (int w = 0; w < kThreadsOf<kBlocks> / 32; ++w) best = larger(best, s.warp_mass[w]);
    *in_block<kBlocks>(&s.best[cluster_rank<kBlocks>()], static_cast<int>(threadIdx.x)) = best;
  }
  cluster_sync<kBlocks>();
  best = s.best[0];
  for (int r = 1; r < kBlocks; ++r) best = larger(best, s.best[r]);
  return best;
}

/// The histogram of this block's piece.
template <int kBlocks>
__device__ void fill_bins(Shared& s, bool counted) {
  constexpr int kBatch = 4;
  const Piece piece = s.piece;
  piece.for_batches<kBlocks, kBatch>([&](std::uint32_t first, const float(&logits)[kBatch]) {
    Mass masses[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) masses[k] = piece.mass(logits[k]);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const bool there = first + k * kThreadsOf<kBlocks> < piece.size;
      add(s.own, there ? piece.bin(logits[k]) : -1, masses[k], counted);
    }
  });
}

__device__ float logit_of(Key key) {
  const auto bits = static_cast<std::uint32_t>(key >> 32);
  return __uint_as_float((bits & 0x80000000U) != 0 ? bits ^ 0x80000000U : ~bits);
}

template <int kBlocks>
__global__ void __launch_bounds__(kThreadsOf<kBlocks>, kBlocks == 1 ? 1 : 2)
    sample_kernel(const __grid_constant__ SampleRowsParams params, int unit_bits) {
#if __CUDA_ARCH__ < 900
  if constexpr (kBlocks > 1) return;  // never launched there
#endif
  extern __shared__ uint4 memory_of_block[];
  Shared& s = *reinterpret_cast<Shared*>(memory_of_block);
  const int rank = cluster_rank<kBlocks>();
  const std::int64_t row = blockIdx.x / kBlocks;
  const bool writes = rank == 0 && threadIdx.x == 0;
  if (threadIdx.x == 0) {
    const auto cols = static_cast<std::uint32_t>(params.cols);
    const std::uint32_t share = (cols + kBlocks - 1) / kBlocks;
    s.piece.first = min(share * static_cast<std::uint32_t>(rank), cols);
    s.piece.size = min(share, cols - s.piece.first);
    s.piece.x = params.x + row * params.cols + s.piece.first;
  }
  if (threadIdx.x < kSearches) s.listed[threadIdx.x] = 0;
  clear<kBlocks>(s.own);
  __syncthreads();

  const Key best = largest<kBlocks>(s);
  const float top = logit_of(best);
  if (best == ~Key{0} || !isfinite(top)) {
    if (writes) params.out[row] = -1;
    return;
  }
  if (params.draws == nullptr || params.draws[row].temperature == 0) {
    if (writes) params.out[row] = static_cast<std::int32_t>(~static_cast<std::uint32_t>(best));
    return;
  }
  const RowDraw& draw = params.draws[row];
  if (threadIdx.x == 0) {
    const double inverse = 1.0 / draw.temperature;
    s.piece.top = top;
    s.piece.bins_per_logit = fminf(kBinsPerUnit * static_cast<float>(inverse), kMostBinsPerLogit);
    s.piece.inverse_temperature = fmin(inverse, DBL_MAX);
    s.piece.unit = static_cast<double>(1ULL << unit_bits);
  }
  __syncthreads();
  const bool cut = draw.top_k > 0 && draw.top_k < params.cols;
  fill_bins<kBlocks>(s, cut);
  sum_up<kBlocks>(s, s.row);

  Place last = {s.row.mass[kBins - 1], 0, 0};
#pragma unroll 1
  for (int search = cut ? kFirst : kNucleus; search < kSearches; ++search) {
    Mass wanted = 0;
    if (search == kFirst) {
      wanted = static_cast<Mass>(draw.top_k);
    } else if (search == kNucleus) {
      if (draw.top_p >= 1) continue;
      wanted = __double2ull_ru(draw.top_p * static_cast<double>(last.mass));
      wanted = min(max(wanted, Mass{1}), last.mass);
    } else {
      wanted = __double2ull_rd(draw.uniform * static_cast<double>(last.mass));
      wanted = min(wanted, last.mass - 1) + 1;
    }
    last = find<kBlocks>(s, search, search == kFirst, wanted);
  }
  if (writes) params.out[row] = static_cast<std::int32_t>(last.at);
}

template <int kBlocks>
cudaError_t launch(const SampleRowsParams& params, int unit_bits, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(
      sample_kernel<kBlocks>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  return launch_dependent<kBlocks>(
      sample_kernel<kBlocks>, dim3(static_cast<unsigned>(params.num_rows) * kBlocks),
      dim3(kThreadsOf<kBlocks>), sizeof(Shared), stream, false, params, unit_bits);
}

}  // namespace

void sample_rows(const SampleRowsParams& params, bool clusters, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  // The weights of a row together stay within 2^62.
  int unit_bits = 62;
  while (unit_bits > 0 && (std::int64_t{1} << (62 - unit_bits)) < params.cols) --unit_bits;
  TWILIGHT_CUDA(clusters ? launch<kCluster>(params, unit_bits, stream)
                         : launch<1>(params, unit_bits, stream));
}

}  // namespace twilight::cuda_fast
