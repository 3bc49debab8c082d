#ifndef TWILIGHT_SERVER_STOP_FILTER_H_
#define TWILIGHT_SERVER_STOP_FILTER_H_

#include <string>
#include <vector>

namespace twilight::server {

/// Looks for stop strings in streamed text. Text that may turn out to be the beginning of one is
/// held back, so no part of a stop string is ever shown.
class StopFilter {
 public:
  /// Empty strings are left out.
  explicit StopFilter(std::vector<std::string> stops);
  /// Text now certain to come before any stop string.
  [[nodiscard]] std::string push(const std::string& piece);
  /// What is held back, at the end of a text without a stop string.
  [[nodiscard]] std::string flush();
  /// A stop string has been found; everything from it on is dropped.
  [[nodiscard]] bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_STOP_FILTER_H_
