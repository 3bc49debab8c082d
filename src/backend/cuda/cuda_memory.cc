#include "backend/cuda/cuda_memory.h"

#include <cstdint>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/host_words.h"

namespace twilight::cuda {
namespace {

constexpr std::size_t kSmallUpload = 32000;

}  // namespace

void CudaMemory::use_device() const { TWILIGHT_CUDA(cudaSetDevice(device_)); }

std::size_t CudaMemory::free_bytes() const {
  use_device();
  std::size_t free = 0;
  std::size_t total = 0;
  TWILIGHT_CUDA(cudaMemGetInfo(&free, &total));
  return free;
}

std::byte* CudaMemory::allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  use_device();
  void* memory = nullptr;
  TWILIGHT_CUDA(cudaMalloc(&memory, bytes));
  const cudaError_t status = cudaMemsetAsync(memory, 0, bytes, stream_);
  if (status != cudaSuccess) cudaFree(memory);
  TWILIGHT_CUDA(status);
  return static_cast<std::byte*>(memory);
}

void CudaMemory::release(std::byte* memory, std::size_t /*bytes*/) noexcept { cudaFree(memory); }

void CudaMemory::upload(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  // As kernel arguments nothing has to wait.
  if (bytes <= kSmallUpload && bytes % sizeof(std::uint32_t) == 0) {
    send_words(from, to, static_cast<std::int64_t>(bytes / sizeof(std::uint32_t)), stream_);
    return;
  }
  TWILIGHT_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
  TWILIGHT_CUDA(cudaStreamSynchronize(stream_));
}

void CudaMemory::download(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  TWILIGHT_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
  TWILIGHT_CUDA(cudaStreamSynchronize(stream_));
}

void CudaMemory::fill(void* to, int byte, std::size_t bytes) {
  if (bytes > 0) TWILIGHT_CUDA(cudaMemsetAsync(to, byte, bytes, stream_));
}

void CudaMemory::synchronize() { TWILIGHT_CUDA(cudaStreamSynchronize(stream_)); }

}  // namespace twilight::cuda
