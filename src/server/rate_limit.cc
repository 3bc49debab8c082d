#include "server/rate_limit.h"

#include <algorithm>

namespace twilight::server {
namespace {

constexpr std::size_t kManyClients = 4096;

double seconds(RateLimit::Clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

}  // namespace

RateLimit::RateLimit(double rate, double burst) : rate_(rate), burst_(std::max(burst, 1.0)) {}

double RateLimit::take(const std::string& client, Clock::time_point now) {
  if (rate_ <= 0) return 0;
  const std::lock_guard lock(mutex_);
  if (buckets_.size() >= kManyClients) forget_full(now);
  Bucket& bucket = buckets_.try_emplace(client, Bucket{burst_, now}).first->second;
  bucket.tokens = std::min(burst_, bucket.tokens + rate_ * seconds(now - bucket.at));
  bucket.at = now;
  if (bucket.tokens < 1) return (1 - bucket.tokens) / rate_;
  bucket.tokens -= 1;
  return 0;
}

void RateLimit::forget_full(Clock::time_point now) {
  std::erase_if(buckets_, [&](const auto& entry) {
    return entry.second.tokens + rate_ * seconds(now - entry.second.at) >= burst_;
  });
}

}  // namespace twilight::server
