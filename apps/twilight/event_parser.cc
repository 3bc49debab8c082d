#include "event_parser.h"

#include <utility>

namespace twilight::app {

std::vector<std::string> EventParser::feed(std::string_view bytes) {
  std::vector<std::string> events;
  for (const char byte : bytes) {
    if (byte == '\r') continue;
    if (byte != '\n') {
      line_ += byte;
      continue;
    }
    if (line_.empty()) {  // an event's end
      if (has_data_) events.push_back(std::exchange(data_, {}));
      has_data_ = false;
    } else if (line_.rfind("data:", 0) == 0) {
      if (has_data_) data_ += '\n';
      has_data_ = true;
      data_ += line_.substr(line_.size() > 5 && line_[5] == ' ' ? 6 : 5);
    }
    line_.clear();
  }
  return events;
}

}  // namespace twilight::app
