#ifndef TWILIGHT_APPS_PROGRESS_H_
#define TWILIGHT_APPS_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <string>

#include "twilight/engine.h"

namespace twilight::app {

/// Whether progress and colours may be shown: standard error is a terminal and --json was not asked
/// for.
[[nodiscard]] bool stderr_is_terminal();
[[nodiscard]] bool stdout_is_terminal();

/// A one-line bar on standard error, redrawn a few times a second and removed at the end; silent
/// where standard error is not a terminal. `callback` stops the work when the user pressed Ctrl-C.
class ProgressBar {
 public:
  /// `unit` follows the count, e.g. "tokens"; empty shows per cent alone.
  ProgressBar(std::string label, std::string unit, bool enabled);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void update(std::int64_t done, std::int64_t total);
  void clear();
  [[nodiscard]] Progress callback();

 private:
  std::string label_, unit_;
  bool enabled_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_, last_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_PROGRESS_H_
