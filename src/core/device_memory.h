#ifndef TWILIGHT_CORE_DEVICE_MEMORY_H_
#define TWILIGHT_CORE_DEVICE_MEMORY_H_

#include <cstddef>
#include <utility>

namespace twilight {

/// The memory a backend's ops work on, for those who own what the parameter blocks point at. Calls
/// are ordered with the backend's ops: an upload is seen by ops that follow it, a download waits
/// for ops before it. Not thread-safe, like the backend; throws Error(kOutOfMemory) or
/// Error(kInternal).
class DeviceMemory {
 public:
  virtual ~DeviceMemory();

  /// Whether pointers are ordinary host memory, so that nothing needs copying.
  [[nodiscard]] virtual bool is_host() const = 0;
  /// Bytes that can still be allocated, as far as the device says; 0 where it does not.
  [[nodiscard]] virtual std::size_t free_bytes() const = 0;
  /// Zeroed memory on 256-byte boundaries (on the host whole pages, touched as they are first
  /// written). Null for 0.
  [[nodiscard]] virtual std::byte* allocate(std::size_t bytes) = 0;
  /// `bytes` as allocated.
  virtual void release(std::byte* memory, std::size_t bytes) noexcept = 0;

  /// Host to device. `from` may be reused when the call returns.
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  /// Device to host; complete when the call returns.
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  virtual void fill(void* to, int byte, std::size_t bytes) = 0;
  /// Waits for every op so far; errors of kernels come out here.
  virtual void synchronize() = 0;
};

/// The host's own memory.
[[nodiscard]] DeviceMemory& host_memory();

/// Owns one allocation. Move-only; must not outlive its memory.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceMemory& memory, std::size_t bytes)
      : memory_(&memory), data_(memory.allocate(bytes)), size_(bytes) {}
  ~DeviceBuffer() {
    if (data_ != nullptr) memory_->release(data_, size_);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : memory_(other.memory_),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  template <typename T>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  DeviceMemory* memory_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace twilight

#endif  // TWILIGHT_CORE_DEVICE_MEMORY_H_
