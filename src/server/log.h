#ifndef TWILIGHT_SERVER_LOG_H_
#define TWILIGHT_SERVER_LOG_H_

#include <cstdio>
#include <mutex>
#include <string>

#include "server/api_error.h"

namespace twilight::server {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };
/// debug, info, warning, error or off; throws Error.
[[nodiscard]] LogLevel log_level(const std::string& name);

/// One line an event: a JSON object, or "time level event key=value ...". Thread-safe.
class Log {
 public:
  /// `file` is borrowed.
  Log(std::FILE* file, LogLevel level, bool json) : file_(file), level_(level), json_(json) {}
  void write(LogLevel level, const std::string& event, const Json& fields);

 private:
  std::FILE* file_;
  LogLevel level_;
  bool json_;
  std::mutex mutex_;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_LOG_H_
