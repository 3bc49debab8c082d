#ifndef TWILIGHT_SERVER_API_REQUEST_H_
#define TWILIGHT_SERVER_API_REQUEST_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "server/api_error.h"
#include "server/chat_format.h"
#include "server/scheduler.h"

namespace twilight::server {

/// What requests are checked against.
struct RequestContext {
  const Model* model = nullptr;
  const ChatFormat* chat = nullptr;
  std::string model_id;
  SparsePolicy policy;  ///< the server's own
  std::function<bool(const SparsePolicy&)>
      serves;                      ///< whether the server's index has what it reads
  std::int32_t context = 0;        ///< tokens of prompt and completion together
  std::int32_t max_prompt = 0;     ///< prompt tokens; 0: up to `context`
  std::int32_t max_choices = 128;  ///< prompts times n
  std::uint64_t default_seed = 0;  ///< where a request has none
};

/// A checked request of either endpoint: prompts.size() * n choices, in that order.
struct ApiRequest {
  bool chat = false;
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<bool> bos_added;  ///< a prompt's first token is not part of what the client sent
  std::int32_t n = 1;
  Request base;  ///< everything but prompt and client
  std::vector<std::string> stops;
  bool echo = false, stream = false, include_usage = false;
  bool logprobs = false;  ///< base.top_logprobs says how many alternatives
};

/// Bodies of /v1/completions and /v1/chat/completions. Throw ApiError.
[[nodiscard]] ApiRequest parse_completion(const Json& body, const RequestContext& context);
[[nodiscard]] ApiRequest parse_chat(const Json& body, const RequestContext& context);

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_API_REQUEST_H_
