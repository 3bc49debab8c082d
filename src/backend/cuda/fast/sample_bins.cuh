#ifndef TWILIGHT_BACKEND_CUDA_FAST_SAMPLE_BINS_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_SAMPLE_BINS_CUH_

#include <cstdint>

#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/fast/device_ops.cuh"

/// Histograms of the masses of a row of logits, over the blocks of a cluster: what sample.cu
/// searches. For that one file.
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

}  // namespace
}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_SAMPLE_BINS_CUH_
