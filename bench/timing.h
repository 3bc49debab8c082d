#ifndef TWILIGHT_BENCH_TIMING_H_
#define TWILIGHT_BENCH_TIMING_H_

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "core/buffer.h"
#include "core/thread_pool.h"

/// What benchmarks share: wall times of repeated work, and the plain read they are judged by.
namespace twilight::bench {

/// Seconds: median, p10, p90 and the least.
struct Times {
  double median = 0;
  double low = 0;
  double high = 0;
  double best = 0;
};

inline Times measure(int repeats, const std::function<void()>& work) {
  work();
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double f) {
    return seconds[static_cast<std::size_t>(f * static_cast<double>(seconds.size() - 1) + 0.5)];
  };
  return {at(0.5), at(0.1), at(0.9), seconds.front()};
}

/// Adds up `bytes` read as four streams.
inline std::uint64_t read_streams(const std::byte* data, std::size_t bytes) {
  typedef std::uint64_t Vec __attribute__((vector_size(64)));
  const std::size_t part = bytes / 4 / 64;
  const auto* p = reinterpret_cast<const Vec*>(data);
  Vec sums[4] = {};
  for (std::size_t i = 0; i < part; ++i) {
    for (std::size_t s = 0; s < 4; ++s) sums[s] += p[s * part + i];
  }
  std::uint64_t total = 0;
  for (const Vec& sum : sums) {
    for (int i = 0; i < 8; ++i) total += sum[i];
  }
  return total;
}

/// Best of several passes over `memory`, GB/s.
inline double read_bandwidth(ThreadPool& pool, const Buffer& memory, int repeats) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  [[maybe_unused]] static volatile std::uint64_t sink = 0;
  const std::size_t pieces = memory.size() / kPiece;
  std::vector<std::uint64_t> sums(pieces);
  const Times times = measure(repeats, [&] {
    pool.parallel_for(static_cast<std::int64_t>(pieces), [&](std::int64_t i, int) {
      sums[static_cast<std::size_t>(i)] =
          read_streams(memory.data() + static_cast<std::size_t>(i) * kPiece, kPiece);
    });
    sink = std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
  });
  return static_cast<double>(pieces * kPiece) / times.best / 1e9;
}

}  // namespace twilight::bench

#endif  // TWILIGHT_BENCH_TIMING_H_
