#include <cstdint>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/read_through.h"

namespace twilight::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2048;
constexpr int kInFlight = 8;

/// Each block takes tiles of kInFlight * kThreads * 16 bytes. The sum is compared to a value so
/// that no load can be left out.
__global__ void __launch_bounds__(kThreads)
    read_through_kernel(const uint4* data, std::int64_t count, unsigned* never) {
  unsigned sum = 0;
  constexpr std::int64_t kTile = std::int64_t{kInFlight} * kThreads;
  for (std::int64_t at = blockIdx.x * kTile + threadIdx.x; at < count; at += gridDim.x * kTile) {
    uint4 part[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::int64_t j = at + std::int64_t{i} * kThreads;
      part[i] = j < count ? __ldcs(data + j) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum ^= part[i].x ^ part[i].y ^ part[i].z ^ part[i].w;
  }
  if (sum == 0x5bd1e995U && never != nullptr) *never = sum;
}

}  // namespace

void read_through(const std::byte* data, std::size_t bytes, cudaStream_t stream) {
  // A null sink, unknown to the compiler: the kernel writes nothing.
  read_through_kernel<<<kBlocks, kThreads, 0, stream>>>(
      reinterpret_cast<const uint4*>(data), static_cast<std::int64_t>(bytes / 16), nullptr);
  check_launch("read_through");
}

}  // namespace twilight::cuda
