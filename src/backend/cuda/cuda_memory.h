#ifndef TWILIGHT_BACKEND_CUDA_CUDA_MEMORY_H_
#define TWILIGHT_BACKEND_CUDA_CUDA_MEMORY_H_

#include <cuda_runtime_api.h>

#include "core/device_memory.h"

namespace twilight::cuda {

/// Global memory of one GPU, its transfers ordered by the backend's stream. Not for stream capture:
/// transfers wait.
class CudaMemory final : public DeviceMemory {
 public:
  CudaMemory(int device, cudaStream_t stream) : device_(device), stream_(stream) {}

  [[nodiscard]] bool is_host() const override { return false; }
  [[nodiscard]] std::size_t free_bytes() const override;
  [[nodiscard]] std::byte* allocate(std::size_t bytes) override;
  void release(std::byte* memory, std::size_t bytes) noexcept override;
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;
  void fill(void* to, int byte, std::size_t bytes) override;
  void synchronize() override;

 private:
  void use_device() const;

  int device_;
  cudaStream_t stream_;
};

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_CUDA_MEMORY_H_
