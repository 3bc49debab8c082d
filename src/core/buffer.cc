#include "core/buffer.h"

#include <cstdlib>
#include <utility>

#include <sys/mman.h>

#include "core/check.h"

namespace twilight {

// mmap rather than operator new: large pools start as untouched zero pages, and huge pages halve
// the cost of walking them.
Buffer::Buffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* address =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) {
    size_ = 0;
    fail(ErrorCode::kOutOfMemory, "buffer", "cannot allocate ", bytes, " bytes");
  }
#if defined(MADV_HUGEPAGE)
  if (bytes >= (std::size_t{4} << 20)) ::madvise(address, bytes, MADV_HUGEPAGE);
#endif
  data_ = static_cast<std::byte*>(address);
}

Buffer::~Buffer() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::byte* Buffer::release() {
  size_ = 0;
  return std::exchange(data_, nullptr);
}

Buffer Buffer::adopt(std::byte* data, std::size_t bytes) {
  Buffer buffer;
  buffer.data_ = data;
  buffer.size_ = bytes;
  return buffer;
}

std::byte* Arena::take_bytes(const char* name, std::size_t bytes) {
  const std::size_t offset = align_up(used_);
  used_ = offset + bytes;
  if (base_ == nullptr) return nullptr;
  require(used_ <= capacity_, "workspace", "too small for ", name, ", got ", capacity_,
          " bytes, accepted at least ", used_);
  return base_ + offset;
}

}  // namespace twilight
