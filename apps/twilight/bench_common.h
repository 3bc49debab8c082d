#ifndef TWILIGHT_APPS_BENCH_COMMON_H_
#define TWILIGHT_APPS_BENCH_COMMON_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "flags.h"

namespace twilight::app {

/// What both benchmarks take.
struct BenchFlags {
  CommonFlags common;
  AttentionFlags attention;
  std::string out;
  bool force = false;

  /// --attention may be repeated or hold several presets with commas between.
  void add(CLI::App& command);
};

/// The policies to time: dense first, then each preset named, once each. Throws
/// Error(kInvalidArgument).
[[nodiscard]] std::vector<SparsePolicy> bench_policies(const AttentionFlags& flags);

/// Bytes of the last-level cache of one processor; 32 MiB where the system does not say.
[[nodiscard]] std::int64_t last_level_cache_bytes();
/// Bytes of memory that the system could give now, the limit of a container included.
[[nodiscard]] std::int64_t available_memory_bytes();
/// The system's load average of the last minute; 0 where unknown.
[[nodiscard]] double load_average();

/// Reads `bytes` of its own memory with every thread, so that caches hold nothing of what comes
/// next.
class CacheWalk {
 public:
  CacheWalk(std::int64_t bytes, int threads);
  void run();
  [[nodiscard]] std::int64_t bytes() const { return static_cast<std::int64_t>(memory_.size()) * 8; }

 private:
  std::vector<std::uint64_t> memory_;
  std::size_t threads_;
  std::uint64_t sink_ = 0;
};

class Stopwatch {
 public:
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// "128 MiB", "1.25 GiB".
[[nodiscard]] std::string bytes_text(double bytes);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_BENCH_COMMON_H_
