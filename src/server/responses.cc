#include "server/responses.h"

#include <cmath>
#include <cstdio>
#include <utility>

namespace twilight::server {
namespace {

// JSON has no infinity.
constexpr double kLowest = -9999;

double finite(float logprob) {
  return std::isfinite(logprob) ? static_cast<double>(logprob) : kLowest;
}

bool valid_utf8(const std::string& bytes) {
  try {
    (void)Json(bytes).dump();
    return true;
  } catch (const Json::exception&) {
    return false;
  }
}

// A token's text; tokens that are part of a character as "bytes:\xe2\x80".
std::string spelled(const std::string& bytes) {
  if (valid_utf8(bytes)) return bytes;
  std::string text = "bytes:";
  char hex[8];
  for (const char byte : bytes) {
    std::snprintf(hex, sizeof hex, "\\x%02x",
                  static_cast<unsigned>(static_cast<unsigned char>(byte)));
    text += hex;
  }
  return text;
}

Json byte_values(const std::string& bytes) {
  Json values = Json::array();
  for (const char byte : bytes) values.push_back(static_cast<unsigned char>(byte));
  return values;
}

Json completion_logprobs(const std::vector<TokenText>& tokens) {
  Json json;
  for (const char* name : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
    json[name] = Json::array();
  }
  for (const TokenText& token : tokens) {
    const std::string text = spelled(token.bytes);
    json["tokens"].push_back(text);
    json["text_offset"].push_back(token.offset);
    if (!token.logprob) {
      json["token_logprobs"].push_back(nullptr);
      json["top_logprobs"].push_back(nullptr);
      continue;
    }
    json["token_logprobs"].push_back(finite(*token.logprob));
    Json top = Json::object();
    for (const auto& [bytes, logprob] : token.top) {
      const std::string key = spelled(bytes);
      if (!top.contains(key)) top[key] = finite(logprob);
    }
    if (!top.contains(text)) top[text] = finite(*token.logprob);
    json["top_logprobs"].push_back(std::move(top));
  }
  return json;
}

Json chat_token(const std::string& bytes, float logprob) {
  Json json;
  json["token"] = spelled(bytes);
  json["logprob"] = finite(logprob);
  json["bytes"] = byte_values(bytes);
  return json;
}

Json chat_logprobs(const std::vector<TokenText>& tokens) {
  Json content = Json::array();
  for (const TokenText& token : tokens) {
    Json entry = chat_token(token.bytes, token.logprob.value_or(0.0F));
    entry["top_logprobs"] = Json::array();
    for (const auto& [bytes, logprob] : token.top) {
      entry["top_logprobs"].push_back(chat_token(bytes, logprob));
    }
    content.push_back(std::move(entry));
  }
  Json json;
  json["content"] = std::move(content);
  json["refusal"] = nullptr;
  return json;
}

Json logprobs_json(bool chat, bool wanted, const std::vector<TokenText>& tokens) {
  if (!wanted) return nullptr;
  return chat ? chat_logprobs(tokens) : completion_logprobs(tokens);
}

Json head_json(const ResponseHead& head, bool piece) {
  Json json;
  json["id"] = head.id;
  json["object"] = !head.chat ? "text_completion"
                   : piece    ? "chat.completion.chunk"
                              : "chat.completion";
  json["created"] = head.created;
  json["model"] = head.model;
  json["choices"] = Json::array();
  if (piece && head.usage) json["usage"] = nullptr;
  return json;
}

}  // namespace

const char* finish_reason(const ChoiceEnd& end) {
  return end.stop_string || end.reason == EndReason::kStop ? "stop" : "length";
}

std::string_view end_reason_name(EndReason reason) {
  switch (reason) {
    case EndReason::kStop:
      return "stop";
    case EndReason::kLength:
      return "length";
    case EndReason::kCancelled:
      return "cancelled";
    case EndReason::kDeadline:
      return "deadline";
    case EndReason::kShutdown:
      return "shutdown";
    case EndReason::kError:
      return "error";
  }
  return "error";
}

std::optional<ApiError> failure(const ChoiceEnd& end) {
  const std::string code(end_reason_name(end.reason));
  switch (end.reason) {
    case EndReason::kStop:
    case EndReason::kLength:
      return std::nullopt;
    case EndReason::kDeadline:
      return ApiError(504, "the request's time is over", code);
    case EndReason::kShutdown:
      return ApiError(503, "the server is shutting down", code).retry_after(1);
    case EndReason::kCancelled:
      return ApiError(503, "the request was cancelled", code);
    case EndReason::kError:
      return ApiError(500, end.error.empty() ? "internal error" : end.error, code);
  }
  return std::nullopt;
}

Json usage_json(const std::vector<ChoiceState>& choices, std::int32_t n) {
  std::int64_t prompt = 0, cached = 0, completion = 0, read = 0, dense = 0;
  double kept = 0, weight = 0;
  for (std::size_t i = 0; i < choices.size(); ++i) {
    if (!choices[i].end) continue;
    const RequestUsage& usage = choices[i].end->usage;
    if (i % static_cast<std::size_t>(n) == 0) {
      prompt += usage.prompt_tokens;
      cached += usage.cached_tokens;
    }
    completion += usage.completion_tokens;
    read += usage.kv_bytes_read;
    dense += usage.kv_bytes_dense;
    kept += usage.kept_tokens_mean * static_cast<double>(usage.sparse_layers);
    weight += static_cast<double>(usage.sparse_layers);
  }
  Json json;
  json["prompt_tokens"] = prompt;
  json["completion_tokens"] = completion;
  json["total_tokens"] = prompt + completion;
  json["prompt_tokens_details"]["cached_tokens"] = cached;
  json["kv_bytes_ratio"] =
      dense == 0 ? 1.0 : static_cast<double>(read) / static_cast<double>(dense);
  json["kept_tokens_mean"] = weight == 0 ? Json(nullptr) : Json(kept / weight);
  return json;
}

Json response_json(const ResponseHead& head, const std::vector<ChoiceState>& choices,
                   std::int32_t n, bool logprobs) {
  Json json = head_json(head, false);
  for (std::size_t i = 0; i < choices.size(); ++i) {
    Json choice;
    choice["index"] = i;
    if (head.chat) {
      choice["message"]["role"] = "assistant";
      choice["message"]["content"] = choices[i].text;
      choice["message"]["refusal"] = nullptr;
    } else {
      choice["text"] = choices[i].text;
    }
    choice["logprobs"] = logprobs_json(head.chat, logprobs, choices[i].tokens);
    choice["finish_reason"] = finish_reason(choices[i].end.value_or(ChoiceEnd{}));
    json["choices"].push_back(std::move(choice));
  }
  json["usage"] = usage_json(choices, n);
  return json;
}

Json piece_json(const ResponseHead& head, const ChoiceEvent& event, bool first, bool logprobs) {
  Json json = head_json(head, true);
  Json choice;
  choice["index"] = event.choice;
  if (head.chat) {
    choice["delta"] = Json::object();
    if (first) choice["delta"]["role"] = "assistant";
    choice["delta"]["content"] = event.text;
  } else {
    choice["text"] = event.text;
  }
  choice["logprobs"] = logprobs_json(head.chat, logprobs, event.tokens);
  choice["finish_reason"] = nullptr;
  json["choices"].push_back(std::move(choice));
  return json;
}

Json end_json(const ResponseHead& head, std::int32_t index, const char* reason) {
  Json json = head_json(head, true);
  Json choice;
  choice["index"] = index;
  if (head.chat) {
    choice["delta"] = Json::object();
  } else {
    choice["text"] = "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = reason;
  json["choices"].push_back(std::move(choice));
  return json;
}

Json usage_piece_json(const ResponseHead& head, Json usage) {
  Json json = head_json(head, true);
  json["usage"] = std::move(usage);
  return json;
}

std::string sse(const Json& json) { return "data: " + dump(json) + "\n\n"; }

}  // namespace twilight::server
