#ifndef TWILIGHT_BACKEND_CUDA_FAST_BARRIER_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_BARRIER_CUH_

#include <cstdint>

/// Barriers in shared memory, by address, that threads and copies arrive at.
namespace twilight::cuda_fast {

/// `count` arrivals end a phase.
__device__ __forceinline__ void init_barrier(std::uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(std::uint32_t at) {
  [[maybe_unused]] std::uint64_t state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(at) : "memory");
}
/// Arrives once this thread's asynchronous copies so far have.
__device__ __forceinline__ void arrive_after_copies(std::uint32_t at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_BARRIER_CUH_
