#ifndef TWILIGHT_BACKEND_CUDA_DEVICE_THRESHOLD_CUH_
#define TWILIGHT_BACKEND_CUDA_DEVICE_THRESHOLD_CUH_

#include <cstdint>

#include "backend/cuda/device/reduce.cuh"

namespace twilight::cuda {

/// One element in the order of taking: larger keys first. Masses are integers, so their sums do not
/// depend on the order of additions.
struct RankedItem {
  std::uint32_t key = 0;
  unsigned long long mass = 0;
  bool takes_part = false;
};

/// The key at which a run from the largest key first has enough mass and enough members.
struct Threshold {
  std::uint32_t key;              ///< 0 where nothing is enough
  bool reached;                   ///< whether the whole is enough
  int count_above;                ///< members with larger keys
  unsigned long long mass_above;  ///< and their mass
};

/// Shared memory of `find_threshold`.
struct ThresholdScratch {
  int counts[256];
  unsigned long long masses[256];
  Threshold found;
};

/// Radix descent, 8 bits a pass. `item(i)` gives the i-th of `size` elements; it is called four
/// times. All threads of the block, whole warps; every thread gets the result.
template <typename ItemAt>
__device__ Threshold find_threshold(std::int64_t size, const ItemAt& item,
                                    unsigned long long wanted_mass, int wanted_count,
                                    ThresholdScratch& scratch) {
  if (threadIdx.x == 0) scratch.found = {};
  const int lane = threadIdx.x % 32;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
      scratch.counts[i] = 0;
      scratch.masses[i] = 0;
    }
    __syncthreads();
    const Threshold before = scratch.found;
    for (std::int64_t base = 0; base < size; base += blockDim.x) {
      const std::int64_t i = base + threadIdx.x;
      RankedItem it;
      if (i < size) it = item(i);
      // The first digit is sign and exponent: few values, so each warp adds up its own first.
      const bool in = it.takes_part && (shift == 24 || it.key >> (shift + 8) == before.key);
      const int bin = static_cast<int>(it.key >> shift & 255U);
      if (shift < 24) {
        if (in) {
          atomicAdd(&scratch.counts[bin], 1);
          atomicAdd(&scratch.masses[bin], it.mass);
        }
        continue;
      }
      for (unsigned left = __ballot_sync(kFullMask, in); left != 0;) {
        const int leader = __ffs(static_cast<int>(left)) - 1;
        const int leader_bin = __shfl_sync(kFullMask, bin, leader);
        const bool same = in && bin == leader_bin;
        const unsigned peers = __ballot_sync(kFullMask, same);
        const auto mass = warp_reduce(same ? it.mass : 0ULL, Sum<unsigned long long>());
        if (lane == leader) {
          atomicAdd(&scratch.counts[bin], __popc(peers));
          atomicAdd(&scratch.masses[bin], mass);
        }
        left &= ~peers;
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // Lane l owns bins 255 - 8 l down to 248 - 8 l.
      int count = 0;
      unsigned long long mass = 0;
      for (int b = 0; b < 8; ++b) {
        count += scratch.counts[255 - 8 * lane - b];
        mass += scratch.masses[255 - 8 * lane - b];
      }
      int count_to = count;
      unsigned long long mass_to = mass;
      for (int step = 1; step < 32; step *= 2) {
        const int c = __shfl_up_sync(kFullMask, count_to, step);
        const unsigned long long m = __shfl_up_sync(kFullMask, mass_to, step);
        if (lane >= step) {
          count_to += c;
          mass_to += m;
        }
      }
      const auto enough = [&](int c, unsigned long long m) {
        return before.count_above + c >= wanted_count && before.mass_above + m >= wanted_mass;
      };
      if (enough(count_to, mass_to) && !enough(count_to - count, mass_to - mass)) {
        int c = count_to - count;
        unsigned long long m = mass_to - mass;
        int bin = 255 - 8 * lane;
        while (!enough(c + scratch.counts[bin], m + scratch.masses[bin])) {
          c += scratch.counts[bin];
          m += scratch.masses[bin];
          --bin;
        }
        scratch.found.key = before.key << 8 | static_cast<std::uint32_t>(bin);
        scratch.found.reached = true;
        scratch.found.count_above = before.count_above + c;
        scratch.found.mass_above = before.mass_above + m;
      }
    }
    __syncthreads();
    if (!scratch.found.reached) break;
  }
  const Threshold found = scratch.found;
  __syncthreads();
  return found;
}

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_DEVICE_THRESHOLD_CUH_
