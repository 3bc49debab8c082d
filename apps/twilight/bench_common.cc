#include "bench_common.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <numeric>
#include <sstream>
#include <thread>

#include "table.h"
#include "twilight/error.h"

namespace twilight::app {
namespace {

/// The first number of a file, times its unit if one follows ("32768K"); -1 where there is none.
std::int64_t number_in(const std::string& path) {
  std::ifstream file(path);
  std::int64_t value = -1;
  if (!(file >> value)) return -1;
  const int unit = file.get();
  if (unit == 'K') return value << 10;
  if (unit == 'M') return value << 20;
  return value;
}

}  // namespace

void BenchFlags::add(CLI::App& command) {
  common.add(command);
  attention.add(command);
  command.get_option("--attention")
      ->join(',')
      ->description(
          "Presets to time against dense, repeated or with commas: adaptive, paper, paper-full, "
          "quest:K, streaming, profile");
  // In a list the profile is the preset of that name.
  command.get_option("--attention")->remove_excludes(command.get_option("--profile"));
  command.get_option("--profile")->remove_excludes(command.get_option("--attention"));
  command.add_option("--out", out, "Write the report to this file too (JSON)");
  command.add_flag("--force", force, "Replace the report file if it exists");
}

std::vector<SparsePolicy> bench_policies(const AttentionFlags& flags) {
  std::vector<SparsePolicy> policies = {flags.policy("dense")};
  std::istringstream list(flags.list());
  for (std::string name; std::getline(list, name, ',');) {
    const bool known = std::any_of(policies.begin(), policies.end(),
                                   [&](const SparsePolicy& policy) { return policy.name == name; });
    if (!known) policies.push_back(flags.policy(name));
  }
  return policies;
}

std::int64_t last_level_cache_bytes() {
  std::int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    largest = std::max(largest, number_in("/sys/devices/system/cpu/cpu0/cache/index" +
                                          std::to_string(index) + "/size"));
  }
  return largest > 0 ? largest : std::int64_t{32} << 20;
}

std::int64_t available_memory_bytes() {
  std::int64_t available = std::numeric_limits<std::int64_t>::max();
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) {
      available = std::strtoll(line.c_str() + sizeof("MemAvailable:"), nullptr, 10) << 10;
    }
  }
  // Of a container's memory, file pages can be taken back and anonymous ones cannot.
  const std::int64_t limit = number_in("/sys/fs/cgroup/memory.max");
  std::ifstream stat("/sys/fs/cgroup/memory.stat");
  std::string name;
  std::int64_t used = 0;
  if (limit > 0 && stat >> name >> used && name == "anon") {
    available = std::min(available, std::max<std::int64_t>(0, limit - used));
  }
  return available;
}

double load_average() {
  double load = 0;
  return ::getloadavg(&load, 1) == 1 ? load : 0;
}

CacheWalk::CacheWalk(std::int64_t bytes, int threads)
    : memory_(static_cast<std::size_t>(bytes / 8), 1),
      threads_(static_cast<std::size_t>(std::max(threads, 1))) {}

void CacheWalk::run() {
  std::vector<std::uint64_t> sums(threads_);
  std::vector<std::thread> workers;
  for (std::size_t i = 0; i < threads_; ++i) {
    workers.emplace_back([this, i, &sums] {
      const std::size_t first = memory_.size() * i / threads_;
      const std::size_t last = memory_.size() * (i + 1) / threads_;
      sums[i] =
          std::accumulate(memory_.begin() + static_cast<std::ptrdiff_t>(first),
                          memory_.begin() + static_cast<std::ptrdiff_t>(last), std::uint64_t{0});
    });
  }
  for (std::thread& worker : workers) worker.join();
  sink_ += std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
  [[maybe_unused]] volatile std::uint64_t observed = sink_;  // so the loads cannot be left out
}

std::string bytes_text(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1000 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return digits3(bytes) + " " + units[unit];
}

}  // namespace twilight::app
