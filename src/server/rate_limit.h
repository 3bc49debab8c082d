#ifndef TWILIGHT_SERVER_RATE_LIMIT_H_
#define TWILIGHT_SERVER_RATE_LIMIT_H_

#include <chrono>
#include <mutex>
#include <string>
#include <unordered_map>

namespace twilight::server {

/// A token bucket for every client: `rate` requests a second, up to `burst` at once. Thread-safe.
class RateLimit {
 public:
  using Clock = std::chrono::steady_clock;
  /// rate 0: no limit.
  RateLimit(double rate, double burst);
  /// 0: go on; else the seconds after which a request would pass.
  [[nodiscard]] double take(const std::string& client, Clock::time_point now = Clock::now());

 private:
  struct Bucket {
    double tokens;
    Clock::time_point at;
  };
  void forget_full(Clock::time_point now);

  double rate_, burst_;
  std::mutex mutex_;
  std::unordered_map<std::string, Bucket> buckets_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_RATE_LIMIT_H_
