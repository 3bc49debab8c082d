#include "backend/cuda/fast/sample.h"

#include <cfloat>
#include <cstdint>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/fast/dependent.cuh"
#include "backend/cuda/fast/device_ops.cuh"

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

using cuda::ordered_key;
using cuda::Sum;
using cuda::warp_reduce;
using Mass = unsigned long long;
using Key = unsigned long long;

constexpr int kCluster = 8;
constexpr int kBins = 2048;
constexpr int kDigits = 256;
constexpr int kList = 1024;
constexpr float kBinsPerUnit = 64.0F;
constexpr float kMostBinsPerLogit = 1e30F;
constexpr double kNothing = 50;  // e^-50 < 2^-72
/// The searches: top_k by count, the nucleus' end and the token by mass.
enum Search : int { kFirst, kNucleus, kToken, kSearches };

template <int kBlocks>
constexpr int kThreadsOf = kBlocks == 1 ? 1024 : 512;

/// Masses and counts of bins.
template <int kCount>
struct Bins {
  Mass mass[kCount];
  std::uint32_t count[kCount];
};

/// A place in the order: what comes before a bin, or up to an item and with it.
struct Place {
  Mass mass;
  std::uint32_t count;
  std::uint32_t at;  ///< the bin, or the item's number
};

/// A block's piece of a row, and what gives its logits bins and masses.
struct Piece {
  const float* x;
  std::uint32_t first;  ///< number of x[0] in the row
  std::uint32_t size;
  float top;
  float bins_per_logit;
  double inverse_temperature;
  double unit;

  [[nodiscard]] __device__ float place(float logit) const {
    return fminf((top - logit) * bins_per_logit, kBins - 1.0F);
  }
  [[nodiscard]] __device__ int bin(float logit) const { return static_cast<int>(place(logit)); }
  [[nodiscard]] __device__ bool in_bin(float logit, float begin) const {
    const float at = place(logit);
    return at >= begin && at < begin + 1.0F;
  }
  /// Without branches, so that several overlap: nothing is left of exp(-kNothing) units.
  [[nodiscard]] __device__ Mass mass(float logit) const {
    const double below = static_cast<double>(top - logit) * inverse_temperature;
    return __double2ull_rn(exp(-fmin(below, kNothing)) * unit);
  }
  /// Larger for what comes earlier in the order.
  [[nodiscard]] __device__ Key key(std::uint32_t i, float logit) const {
    const std::uint32_t number = first + i;
    return Key{ordered_key(logit)} << 32 | ~number;
  }

  /// Loads kBatch logits a thread at a time and calls f(number in the piece of the first one,
  /// logits); the others follow at steps of the block's threads, -inf beyond the end. Whole warps.
  template <int kBlocks, int kBatch, typename F>
  __device__ void for_batches(const F& f) const {
    constexpr int kThreads = kThreadsOf<kBlocks>;
#pragma unroll 1
    for (std::uint32_t base = 0; base < size; base += kThreads * kBatch) {
      float logits[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const std::uint32_t i = base + k * kThreads + threadIdx.x;
        logits[k] = i < size ? x[i] : -INFINITY;
      }
      f(base + threadIdx.x, logits);
    }
  }
  /// Calls f(i, logit, whether there is one) in whole warps.
  template <int kBlocks, typename F>
  __device__ void for_all(const F& f) const {
    constexpr int kBatch = 8;
    for_batches<kBlocks, kBatch>([&](std::uint32_t first_of, const float(&logits)[kBatch]) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const std::uint32_t i = first_of + k * kThreadsOf<kBlocks>;
        f(i, logits[k], i < size);
      }
    });
  }
};

struct Shared {
  Piece piece;
  Bins<kBins> own;       ///< of this block's piece
  Bins<kBins> row;       ///< of the row, summed up from the first bin
  Bins<kDigits> digits;  ///< the same over a digit of the items of one bin
  Key list_key[kList];   ///< in block 0
  Mass list_mass[kList];
  Key best[kCluster];
  Mass warp_mass[32];
  std::uint32_t warp_count[32];
  Place before;  ///< a search's bin
  Place found;   ///< a search's item
  std::uint32_t listed[kSearches];
};

/// What `local` is in the shared memory of another block of the cluster.
template <int kBlocks, typename T>
__device__ __forceinline__ T* in_block(T* local, int rank) {
  if constexpr (kBlocks == 1) return local;
#if __CUDA_ARCH__ >= 900
  T* mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(local), "r"(rank));
  return mapped;
#else
  return local;
#endif
}

/// Adds in halves with a carry: 32-bit atomics are native in shared memory, 64-bit ones a loop.
__device__ __forceinline__ void add_mass(Mass* sum, Mass mass) {
  auto* halves = reinterpret_cast<std::uint32_t*>(sum);
  const auto low = static_cast<std::uint32_t>(mass);
  auto high = static_cast<std::uint32_t>(mass >> 32);
  if (low > 0) {
    const std::uint32_t before = atomicAdd(halves, low);
    high += before + low < before ? 1U : 0U;
  }
  if (high > 0) atomicAdd(halves + 1, high);
}

/// Whole warps; bins below 0 take no part. Adds of a warp to one bin are made one.
template <int kCount>
__device__ __forceinline__ void add(Bins<kCount>& bins, int bin, Mass mass, bool counted) {
  int same = 0;
  __match_all_sync(kFullMask, bin, &same);
  if (same != 0) {
    if (bin < 0) return;
    mass = warp_reduce(mass, Sum<Mass>());
    if (threadIdx.x % 32 != 0) return;
    add_mass(&bins.mass[bin], mass);
    if (counted) atomicAdd(&bins.count[bin], 32U);
  } else if (bin >= 0) {
    add_mass(&bins.mass[bin], mass);
    if (counted) atomicAdd(&bins.count[bin], 1U);
  }
}

template <int kBlocks, int kCount>
__device__ void clear(Bins<kCount>& bins) {
  for (int i = threadIdx.x; i < kCount; i += kThreadsOf<kBlocks>) {
    bins.mass[i] = 0;
    bins.count[i] = 0;
  }
}

/// Sums of all blocks' first kCount bins, and then of all bins before each and with it, in every
/// block.
template <int kBlocks, int kCount>
__device__ void sum_up(Shared& s, Bins<kCount>& out) {
  constexpr int kThreads = kThreadsOf<kBlocks>;
  constexpr int kShare = kCount / kBlocks;
  const int rank = cluster_rank<kBlocks>();
  cluster_sync<kBlocks>();
  for (int bin = rank * kShare + static_cast<int>(threadIdx.x); bin < (rank + 1) * kShare;
       bin += kThreads) {
    Mass mass = 0;
    std::uint32_t count = 0;
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      mass += *in_block<kBlocks>(&s.own.mass[bin], r);
      count += *in_block<kBlocks>(&s.own.count[bin], r);
    }
#pragma unroll
    for (int r = 0; r < kBlocks; ++r) {
      *in_block<kBlocks>(&out.mass[bin], r) = mass;
      *in_block<kBlocks>(&out.count[bin], r) = count;
    }
  }
  cluster_sync<kBlocks>();
  constexpr int kPer = (kCount + kThreads - 1) / kThreads;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int begin = static_cast<int>(threadIdx.x) * kPer;
  Mass mass = 0;
  std::uint32_t count = 0;
#pragma unroll
  for (int i = begin; i < begin + kPer; ++i) {
    if (i < kCount) mass += out.mass[i], count += out.count[i];
  }
  Mass mass_to = mass;
  std::uint32_t count_to = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Mass m = __shfl_up_sync(kFullMask, mass_to, step);
    const std::uint32_t c = __shfl_up_sync(kFullMask, count_to, step);
    if (lane >= step) mass_to += m, count_to += c;
  }
  if (lane == 31) s.warp_mass[warp] = mass_to, s.warp_count[warp] = count_to;
  __syncthreads();
  mass_to -= mass;
  count_to -= count;
  for (int w = 0; w < warp; ++w) mass_to += s.warp_mass[w], count_to += s.warp_count[w];
#pragma unroll
  for (int i = begin; i < begin + kPer; ++i) {
    if (i >= kCount) break;
    out.mass[i] = mass_to += out.mass[i];
    out.count[i] = count_to += out.count[i];
  }
  __syncthreads();
}

/// The bin in which sums first reach `wanted`, 1 or more and not above the whole, and what comes
/// before it. In every block.
template <int kBlocks, int kCount>
__device__ Place bin_of(Shared& s, const Bins<kCount>& sums, bool by_count, Mass wanted) {
  for (int i = threadIdx.x; i < kCount; i += kThreadsOf<kBlocks>) {
    const Place before = {i > 0 ? sums.mass[i - 1] : 0, i > 0 ? sums.count[i - 1] : 0,
                          static_cast<std::uint32_t>(i)};
    const Mass from = by_count ? before.count : before.mass;
    const Mass to = by_count ? sums.count[i] : sums.mass[i];
    if (from < wanted && wanted <= to) s.before = before;
  }
  __syncthreads();
  const Place out = s.before;
  __syncthreads();
  return out;
}

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
