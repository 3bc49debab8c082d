#ifndef TWILIGHT_BACKEND_CUDA_FAST_GRID_RING_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_GRID_RING_CUH_

#include <cstdint>

/// Stages of a ring in shared memory, and events in global memory that blocks of a launch wait for.
namespace twilight::cuda_fast {

/// Until the phase of that parity has ended.
__device__ __forceinline__ void wait_barrier(std::uint32_t at, std::uint32_t parity) {
  std::uint32_t ended = 0;
  while (ended == 0) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(at), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(at), "r"(parity)
        : "memory");
#endif
  }
}

/// A stage of the ring and the parity of the phase it is in.
struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

/// What this thread wrote or has seen written is there for threads that see the count.
__device__ __forceinline__ void signal_event(std::uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_event(const std::uint32_t* counter, std::uint32_t count) {
  std::uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < count);
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_GRID_RING_CUH_
