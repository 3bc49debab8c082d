#include "server/log.h"

#include <array>
#include <chrono>
#include <ctime>

#include "twilight/error.h"

namespace twilight::server {
namespace {

constexpr std::array<const char*, 5> kNames = {"debug", "info", "warning", "error", "off"};

// UTC, RFC 3339 with milliseconds.
std::string now_text() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto millis =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm parts{};
  ::gmtime_r(&seconds, &parts);
  std::array<char, 32> text{};
  const std::size_t n = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &parts);
  std::array<char, 8> tail{};
  std::snprintf(tail.data(), tail.size(), ".%03dZ", static_cast<int>(millis));
  return std::string(text.data(), n) + tail.data();
}

}  // namespace

LogLevel log_level(const std::string& name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<LogLevel>(i);
  }
  throw Error(ErrorCode::kInvalidArgument,
              "[--log-level] level, got '" + name + "', accepted debug, info, warning, error, off");
}

void Log::write(LogLevel level, const std::string& event, const Json& fields) {
  if (level < level_ || level_ == LogLevel::kOff) return;
  const char* name = kNames[static_cast<std::size_t>(level)];
  std::string line;
  if (json_) {
    Json json;
    json["time"] = now_text();
    json["level"] = name;
    json["event"] = event;
    for (const auto& [key, value] : fields.items()) json[key] = value;
    line = dump(json);
  } else {
    line = now_text() + " " + name + " " + event;
    for (const auto& [key, value] : fields.items()) {
      // Strings as they are, but on one line.
      const std::string quoted = dump(value);
      const bool plain = value.is_string() && quoted.size() > 2 &&
                         quoted.find_first_of(" \\=") == std::string::npos;
      line += " " + key + "=" + (plain ? quoted.substr(1, quoted.size() - 2) : quoted);
    }
  }
  line += '\n';
  const std::lock_guard lock(mutex_);
  std::fwrite(line.data(), 1, line.size(), file_);
  std::fflush(file_);
}

}  // namespace twilight::server
