#include "core/device_memory.h"

#include <cstring>

#include "core/buffer.h"

namespace twilight {
namespace {

class HostMemory final : public DeviceMemory {
 public:
  [[nodiscard]] bool is_host() const override { return true; }
  [[nodiscard]] std::size_t free_bytes() const override { return 0; }
  [[nodiscard]] std::byte* allocate(std::size_t bytes) override { return Buffer(bytes).release(); }
  void release(std::byte* memory, std::size_t bytes) noexcept override {
    const Buffer owner = Buffer::adopt(memory, bytes);
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void fill(void* to, int byte, std::size_t bytes) override {
    if (bytes > 0) std::memset(to, byte, bytes);
  }
  void synchronize() override {}
};

}  // namespace

DeviceMemory::~DeviceMemory() = default;

DeviceMemory& host_memory() {
  static HostMemory memory;
  return memory;
}

}  // namespace twilight
