#ifndef TWILIGHT_SERVER_RESPONSES_H_
#define TWILIGHT_SERVER_RESPONSES_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "server/api_error.h"
#include "server/choice_stream.h"

namespace twilight::server {

/// What every object of one response begins with.
struct ResponseHead {
  std::string id, model;
  std::int64_t created = 0;
  bool chat = false;
  bool usage = false;  ///< the stream ends with its usage: the objects before have null there
};

/// Everything a choice has yielded so far.
struct ChoiceState {
  std::string text;
  std::vector<TokenText> tokens;
  std::optional<ChoiceEnd> end;
  bool begun = false;  ///< streams: the role has been sent
};

/// "stop" or "length".
[[nodiscard]] const char* finish_reason(const ChoiceEnd& end);
/// Null where a choice ended as it should, else the refusal that a client gets instead.
[[nodiscard]] std::optional<ApiError> failure(const ChoiceEnd& end);
/// stop, length, cancelled, deadline, shutdown, error.
[[nodiscard]] std::string_view end_reason_name(EndReason reason);

[[nodiscard]] Json usage_json(const std::vector<ChoiceState>& choices, std::int32_t n);
/// A whole response.
[[nodiscard]] Json response_json(const ResponseHead& head, const std::vector<ChoiceState>& choices,
                                 std::int32_t n, bool logprobs);
/// One streamed object: a piece of a choice, its end, or (no choice) the usage.
[[nodiscard]] Json piece_json(const ResponseHead& head, const ChoiceEvent& event, bool first,
                              bool logprobs);
[[nodiscard]] Json end_json(const ResponseHead& head, std::int32_t choice, const char* reason);
[[nodiscard]] Json usage_piece_json(const ResponseHead& head, Json usage);
/// "data: {...}\n\n".
[[nodiscard]] std::string sse(const Json& json);

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_RESPONSES_H_
