#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "engine/device_impl.h"
#include "twilight/engine.h"

namespace twilight {
namespace {

// Several independent streams keep more line fills in flight than one.
std::uint64_t read_block(const std::byte* data, std::int64_t bytes) {
  constexpr int kStreams = 4;
  using Lane = std::uint64_t;
  using Wide __attribute__((vector_size(64))) = Lane;
  const std::int64_t part = bytes / kStreams / 64;
  Wide sums[kStreams] = {};
  for (std::int64_t i = 0; i < part; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      Wide value;
      std::memcpy(&value, data + (s * part + i) * 64, sizeof(value));
      sums[s] ^= value;
    }
  }
  const Wide all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  std::uint64_t out = 0;
  for (int lane = 0; lane < 8; ++lane) out ^= all[lane];
  return out;
}

double device_read_bandwidth(Backend& backend, std::int64_t bytes) {
  constexpr int kPasses = 20;
  DeviceMemory& memory = backend.memory();
  const DeviceBuffer buffer(memory, static_cast<std::size_t>(bytes));
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    memory.synchronize();
    const auto start = std::chrono::steady_clock::now();
    // Several reads a wait, so that the wait does not count.
    constexpr int kReads = 8;
    for (int read = 0; read < kReads; ++read) backend.read_through(buffer.data(), buffer.size());
    memory.synchronize();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(bytes) * kReads / seconds * 1e-9);
  }
  return best;
}

}  // namespace

double measure_read_bandwidth(const Device& device, std::int64_t bytes) {
  constexpr std::int64_t kBlock = 1 << 20;
  constexpr int kPasses = 5;
  require(bytes >= kBlock, "bandwidth", "bytes, got ", bytes, ", accepted ", kBlock, " or more");
  Backend& backend = *device.impl().backend;
  if (!backend.memory().is_host()) return device_read_bandwidth(backend, bytes);
  const std::int64_t blocks = bytes / kBlock;
  Buffer buffer(static_cast<std::size_t>(blocks * kBlock));
  ThreadPool& pool = device.impl().pool;
  std::vector<std::uint64_t> sinks(static_cast<std::size_t>(pool.num_threads()) * 8);
  pool.parallel_for(blocks, [&](std::int64_t block, int) {
    std::memset(buffer.data() + block * kBlock, static_cast<int>(block & 0xff), kBlock);
  });
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.parallel_for(blocks, [&](std::int64_t block, int worker) {
      sinks[static_cast<std::size_t>(worker) * 8] ^=
          read_block(buffer.data() + block * kBlock, kBlock);
    });
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(blocks * kBlock) / seconds * 1e-9);
  }
  std::uint64_t sum = 0;
  for (const std::uint64_t sink : sinks) sum ^= sink;
  [[maybe_unused]] volatile std::uint64_t observed = sum;  // so the loads cannot be left out
  return best;
}

}  // namespace twilight
