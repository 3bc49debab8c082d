#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "server/api_request.h"
#include "server/json_fields.h"

namespace {

using namespace twilight;
using namespace twilight::server;

void check(bool holds) {
  if (!holds) __builtin_trap();
}

struct Server {
  Model model = Model::load(TWILIGHT_SOURCE_DIR "/models/vesper-19m");
  std::unique_ptr<ChatFormat> chat = plain_chat_format();
  RequestContext context;

  Server() {
    context.model = &model;
    context.chat = chat.get();
    context.model_id = "m";
    context.policy = make_policy("adaptive");
    context.serves = [](const SparsePolicy& policy) { return policy.is_dense(); };
    context.context = 4096;
  }
};

void check_request(const ApiRequest& request, const RequestContext& context) {
  const std::int32_t vocab = context.model->info().vocab_size;
  check(!request.prompts.empty() && request.bos_added.size() == request.prompts.size());
  check(request.n >= 1 && request.prompts.size() * static_cast<std::size_t>(request.n) <=
                              static_cast<std::size_t>(context.max_choices));
  check(request.base.max_tokens >= 0);
  for (const auto& prompt : request.prompts) {
    check(!prompt.empty());
    for (const std::int32_t token : prompt) check(token >= 0 && token < vocab);
  }
  for (const auto& [token, bias] : request.base.logit_bias) check(token >= 0 && token < vocab);
  for (const std::string& stop : request.stops) check(!stop.empty());
}

}  // namespace

// Bodies of both endpoints from arbitrary bytes: an ApiError with a status of a refused request, or
// a request that keeps what it promises.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Server kServer;
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  for (const auto parse : {parse_completion, parse_chat}) {
    try {
      check_request(parse(parse_body(std::string(body)), kServer.context), kServer.context);
    } catch (const ApiError& error) {
      check(error.status() >= 400 && error.status() < 500);
    }
  }
  return 0;
}
