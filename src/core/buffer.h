#ifndef TWILIGHT_CORE_BUFFER_H_
#define TWILIGHT_CORE_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace twilight {

/// Alignment of every buffer and workspace slice: a cache line, and a 512-bit vector.
inline constexpr std::size_t kBufferAlignment = 64;

[[nodiscard]] constexpr std::size_t align_up(std::size_t bytes,
                                             std::size_t alignment = kBufferAlignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

/// Zero-initialised memory on 64-byte boundaries (pages come lazily from the system for large
/// sizes). Move-only. Throws Error(kOutOfMemory) naming the size.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  [[nodiscard]] std::byte* data() { return data_; }
  [[nodiscard]] const std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  /// Gives the memory up; `adopt` with its size takes it back.
  [[nodiscard]] std::byte* release();
  [[nodiscard]] static Buffer adopt(std::byte* data, std::size_t bytes);
  template <typename T>
  [[nodiscard]] T* as() {
    return reinterpret_cast<T*>(data_);
  }
  template <typename T>
  [[nodiscard]] const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Bump allocator over a caller's memory. With a null base it only counts, so the same carving code
/// answers "how many bytes" and hands out the slices. `take` throws Error(kInvalidArgument) with
/// the name of the slice that did not fit.
class Arena {
 public:
  Arena() = default;
  Arena(void* base, std::size_t bytes) : base_(static_cast<std::byte*>(base)), capacity_(bytes) {}

  template <typename T>
  [[nodiscard]] T* take(const char* name, std::int64_t count) {
    return reinterpret_cast<T*>(take_bytes(name, static_cast<std::size_t>(count) * sizeof(T)));
  }
  [[nodiscard]] std::size_t used_bytes() const { return used_; }
  /// Bytes the next slice may take.
  [[nodiscard]] std::int64_t free_bytes() const {
    const std::size_t begin = align_up(used_);
    return begin < capacity_ ? static_cast<std::int64_t>(capacity_ - begin) : 0;
  }

 private:
  std::byte* take_bytes(const char* name, std::size_t bytes);

  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t used_ = 0;
};

}  // namespace twilight

#endif  // TWILIGHT_CORE_BUFFER_H_
