#ifndef TWILIGHT_APPS_EVENT_PARSER_H_
#define TWILIGHT_APPS_EVENT_PARSER_H_

#include <string>
#include <string_view>
#include <vector>

namespace twilight::app {

/// Finds events in a stream of server-sent events, wherever its parts are cut.
class EventParser {
 public:
  /// `data` of every event that these bytes complete.
  std::vector<std::string> feed(std::string_view bytes);

 private:
  std::string line_, data_;
  bool has_data_ = false;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_EVENT_PARSER_H_
