#ifndef TWILIGHT_SERVER_METRICS_H_
#define TWILIGHT_SERVER_METRICS_H_

#include <memory>
#include <string>

#include "server/scheduler.h"

namespace twilight::server {

/// What /metrics shows, in Prometheus' text format. Thread-safe.
class Metrics {
 public:
  /// The scheduler's counts are read when the text is asked for; it must outlive this.
  explicit Metrics(const Scheduler& scheduler);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  /// A choice that has ended.
  void choice_ended(EndReason reason, const RequestUsage& usage);
  /// A response that was begun, by route and HTTP status.
  void responded(const std::string& route, int status);
  /// A stream given up because its reader was too slow.
  void slow_reader();
  [[nodiscard]] std::string text() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_METRICS_H_
