#include "server/api_request.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "server/json_fields.h"
#include "twilight/error.h"

namespace twilight::server {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxTopLogprobs = 20;
constexpr std::size_t kMaxStops = 16, kMaxStopBytes = 1024;
constexpr std::size_t kMaxBiases = 1024;
constexpr double kMaxBias = 100;
constexpr double kSmallestTopP = 1e-9;

std::vector<std::string> read_stops(JsonFields& fields) {
  const Json* value = fields.find("stop");
  if (value == nullptr) return {};
  const Json list = value->is_array() ? *value : Json::array({*value});
  std::vector<std::string> stops;
  for (const Json& stop : list) {
    if (!stop.is_string() || stop.get_ref<const std::string&>().empty() ||
        stop.get_ref<const std::string&>().size() > kMaxStopBytes) {
      throw fields.error("stop", "got " + shown(stop) +
                                     ", accepted a string of 1 to 1024 bytes or a list "
                                     "of them");
    }
    stops.push_back(stop.get<std::string>());
  }
  if (stops.size() > kMaxStops) {
    throw fields.error("stop", "got " + std::to_string(stops.size()) + " strings, accepted up to " +
                                   std::to_string(kMaxStops));
  }
  return stops;
}

std::vector<std::pair<std::int32_t, float>> read_bias(JsonFields& fields, std::int32_t vocab) {
  const Json* value = fields.find("logit_bias");
  std::vector<std::pair<std::int32_t, float>> biases;
  if (value == nullptr) return biases;
  if (!value->is_object() || value->size() > kMaxBiases) {
    throw fields.error("logit_bias", "got " + shown(*value) +
                                         ", accepted an object of up to 1024 token ids and biases");
  }
  for (const auto& [key, bias] : value->items()) {
    std::int32_t token = 0;
    const char* end = key.data() + key.size();
    const auto [stop, error] = std::from_chars(key.data(), end, token);
    if (error != std::errc() || stop != end || token < 0 || token >= vocab) {
      throw fields.error("logit_bias", "token id, got " + shown(Json(key)) + ", accepted 0 to " +
                                           std::to_string(vocab - 1));
    }
    if (!bias.is_number() || !(std::abs(bias.get<double>()) <= kMaxBias)) {
      throw fields.error("logit_bias", "bias, got " + shown(bias) + ", accepted -100 to 100");
    }
    biases.emplace_back(token, bias.get<float>());
  }
  return biases;
}

void read_model(JsonFields& fields, const RequestContext& context) {
  const auto model = fields.text("model");
  if (model && *model != context.model_id) {
    throw ApiError(
        404, "model: no such model, got " + shown(Json(*model)) + ", accepted " + context.model_id,
        "model_not_found", "model");
  }
}

// The fields `attention` and `attn_p`.
std::optional<SparsePolicy> read_policy(JsonFields& fields, const RequestContext& context) {
  const auto preset = fields.text("attention");
  const auto p = fields.number("attn_p", 0, 1);
  if (!preset && !p) return std::nullopt;
  SparsePolicy policy = context.policy;
  if (preset && *preset != policy.name) {
    try {
      policy = make_policy(*preset);
    } catch (const Error& error) {
      throw bad_field("attention", error.what());
    }
  }
  if (p) {
    if (policy.is_dense()) {
      throw bad_field("attn_p", "dense attention has no p, accepted with a sparse `attention`");
    }
    policy.p = static_cast<float>(*p);
    policy.layer_p.clear();
  }
  try {
    validate_policy(policy);
  } catch (const Error& error) {
    throw bad_field(p ? "attn_p" : "attention", error.what());
  }
  if (context.serves && !context.serves(policy)) {
    throw fields.error("attention", "got " + shown(Json(policy.name)) +
                                        ", accepted dense or a preset that reads the index of '" +
                                        context.policy.name + "', which this server keeps");
  }
  return policy;
}

// What both endpoints have.
void read_common(JsonFields& fields, const RequestContext& context, ApiRequest& request) {
  read_model(fields, context);
  request.n = static_cast<std::int32_t>(fields.integer("n", 1, context.max_choices).value_or(1));
  Request& base = request.base;
  base.sampling.temperature = fields.number("temperature", 0, 2).value_or(1);
  // With 0 nothing but the likeliest token is left, as with any share below its own.
  base.sampling.top_p = std::max(fields.number("top_p", 0, 1).value_or(1), kSmallestTopP);
  base.sampling.top_k =
      static_cast<std::int32_t>(fields.integer("top_k", -1, kMaxInt32).value_or(0));
  base.sampling.top_k = std::max(base.sampling.top_k, 0);
  const auto seed = fields.integer("seed", std::numeric_limits<std::int64_t>::min(),
                                   std::numeric_limits<std::int64_t>::max());
  base.sampling.seed = seed ? static_cast<std::uint64_t>(*seed) : context.default_seed;
  base.logit_bias = read_bias(fields, context.model->info().vocab_size);
  base.ignore_eos = fields.boolean("ignore_eos").value_or(false);
  base.policy = read_policy(fields, context);
  request.stops = read_stops(fields);
  request.stream = fields.boolean("stream").value_or(false);
  if (const Json* options = fields.find("stream_options")) {
    if (!options->is_object()) {
      throw fields.error("stream_options", "got " + shown(*options) + ", accepted an object");
    }
    if (!request.stream) throw fields.error("stream_options", "accepted with stream: true alone");
    JsonFields inner(*options, "stream_options.");
    request.include_usage = inner.boolean("include_usage").value_or(false);
    inner.ignore("include_obfuscation");
    inner.finish();
  }
  fields.refuse("presence_penalty", 0);
  fields.refuse("frequency_penalty", 0);
  for (const char* name :
       {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}) {
    fields.ignore(name);
  }
}

void check_length(const RequestContext& context, const std::vector<std::int32_t>& prompt,
                  std::int64_t max_tokens, const char* field) {
  const auto tokens = static_cast<std::int64_t>(prompt.size());
  if (tokens == 0) throw bad_field(field, "the prompt is empty, accepted at least one token");
  const std::int64_t limit =
      context.max_prompt > 0 ? std::min(context.max_prompt, context.context) : context.context;
  if (tokens > limit) {
    throw bad_field(field,
                    "prompt, got " + std::to_string(tokens) + " tokens, accepted up to " +
                        std::to_string(limit),
                    "context_length_exceeded");
  }
  if (tokens + max_tokens > context.context) {
    throw bad_field(field,
                    "prompt and max_tokens together, got " + std::to_string(tokens) + " + " +
                        std::to_string(max_tokens) + " tokens, accepted up to " +
                        std::to_string(context.context),
                    "context_length_exceeded");
  }
}

std::vector<std::int32_t> token_ids(const Json& list, std::int32_t vocab) {
  std::vector<std::int32_t> ids;
  ids.reserve(list.size());
  for (const Json& id : list) {
    const bool fits =
        id.is_number_unsigned() && id.get<std::uint64_t>() < static_cast<std::uint64_t>(vocab);
    if (!fits) {
      throw bad_field(
          "prompt", "token id, got " + shown(id) + ", accepted 0 to " + std::to_string(vocab - 1));
    }
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

void add_text(ApiRequest& request, const RequestContext& context, const std::string& text,
              bool add_bos) {
  std::vector<std::int32_t> ids = context.model->encode(text, add_bos);
  const auto bos = context.model->info().bos_token;
  request.bos_added.push_back(add_bos && bos && !ids.empty() && ids.front() == *bos);
  request.prompts.push_back(std::move(ids));
}

void read_prompts(JsonFields& fields, const RequestContext& context, ApiRequest& request) {
  const Json* prompt = fields.find("prompt");
  if (prompt == nullptr) throw bad_field("prompt", "missing, accepted text or token ids");
  const std::int32_t vocab = context.model->info().vocab_size;
  const std::string accepted =
      ", accepted a string, a list of strings, a list of token ids or a list of such lists";
  const auto add = [&](const Json& one) {
    if (one.is_string()) {
      add_text(request, context, one.get<std::string>(), true);
    } else if (one.is_array()) {
      request.prompts.push_back(token_ids(one, vocab));
      request.bos_added.push_back(false);
    } else {
      throw bad_field("prompt", "got " + shown(one) + accepted);
    }
  };
  const bool several = prompt->is_array() && !prompt->empty() && !prompt->front().is_number();
  if (!several) return add(*prompt);
  const auto most = static_cast<std::size_t>(context.max_choices / request.n);
  if (prompt->size() > most) {
    throw bad_field("prompt", "got " + std::to_string(prompt->size()) +
                                  " prompts times n, accepted up to " +
                                  std::to_string(context.max_choices) + " choices");
  }
  for (const Json& one : *prompt) add(one);
}

std::string content_text(const Json& content) {
  if (content.is_string()) return content.get<std::string>();
  std::string text;
  if (content.is_array()) {
    for (const Json& part : content) {
      const bool is_text = part.is_object() && part.value("type", Json()) == "text" &&
                           part.contains("text") && part["text"].is_string();
      if (!is_text) {
        throw bad_field("messages", "content part, got " + shown(part) +
                                        ", accepted {\"type\": \"text\", \"text\": ...}");
      }
      text += part["text"].get<std::string>();
    }
    return text;
  }
  throw bad_field("messages",
                  "content, got " + shown(content) + ", accepted a string or a list of text parts");
}

std::vector<ChatMessage> read_messages(JsonFields& fields) {
  const Json* list = fields.find("messages");
  if (list == nullptr || !list->is_array() || list->empty()) {
    const std::string got = list == nullptr ? "nothing" : list->empty() ? "none" : shown(*list);
    throw bad_field("messages", "got " + got + ", accepted a list of at least one message");
  }
  std::vector<ChatMessage> messages;
  for (const Json& each : *list) {
    if (!each.is_object()) {
      throw bad_field("messages", "message, got " + shown(each) + ", accepted an object");
    }
    JsonFields message(each, "messages.");
    std::string role = message.text("role").value_or("");
    if (role == "developer") role = "system";
    if (role != "system" && role != "user" && role != "assistant") {
      throw bad_field("messages", "role, got " + shown(Json(role)) +
                                      ", accepted system, developer, user or assistant");
    }
    const Json* content = message.find("content");
    if (content == nullptr) throw bad_field("messages", "a message has no content");
    message.ignore("name");
    // An answer of this server, sent back as clients hold it, has these as null or empty.
    message.refuse("tool_calls", Json::array());
    message.refuse("annotations", Json::array());
    for (const char* field : {"tool_call_id", "function_call", "audio"}) message.refuse(field);
    message.ignore("refusal");
    message.finish();
    messages.push_back({std::move(role), content_text(*content)});
  }
  return messages;
}

}  // namespace

ApiRequest parse_completion(const Json& body, const RequestContext& context) {
  ApiRequest request;
  JsonFields fields(body);
  read_common(fields, context, request);
  Request& base = request.base;
  base.max_tokens =
      static_cast<std::int32_t>(fields.integer("max_tokens", 0, kMaxInt32).value_or(16));
  request.echo = fields.boolean("echo").value_or(false);
  if (const auto top = fields.integer("logprobs", 0, kMaxTopLogprobs)) {
    request.logprobs = true;
    base.top_logprobs = static_cast<std::int32_t>(*top);
    base.prompt_logprobs = request.echo;
  }
  // Scoring clients drop the one generated token by its position, so it must be there even where
  // it is an end token.
  if (request.echo && request.logprobs && base.max_tokens == 1) base.ignore_eos = true;
  const auto best_of = fields.integer("best_of", 1, context.max_choices);
  if (best_of && *best_of != request.n) {
    throw fields.error("best_of", "got " + std::to_string(*best_of) +
                                      ", accepted n alone, which is " + std::to_string(request.n));
  }
  fields.refuse("suffix");
  read_prompts(fields, context, request);
  fields.finish();
  for (const auto& prompt : request.prompts) {
    check_length(context, prompt, base.max_tokens, "prompt");
  }
  return request;
}

ApiRequest parse_chat(const Json& body, const RequestContext& context) {
  ApiRequest request;
  request.chat = true;
  JsonFields fields(body);
  read_common(fields, context, request);
  const auto newer = fields.integer("max_completion_tokens", 0, kMaxInt32);
  const auto older = fields.integer("max_tokens", 0, kMaxInt32);
  const auto max_tokens = newer ? newer : older;
  request.logprobs = fields.boolean("logprobs").value_or(false);
  const auto top = fields.integer("top_logprobs", 0, kMaxTopLogprobs);
  if (top && !request.logprobs) {
    throw fields.error("top_logprobs", "accepted with logprobs: true alone");
  }
  if (request.logprobs) request.base.top_logprobs = static_cast<std::int32_t>(top.value_or(0));
  for (const char* name : {"tools", "tool_choice", "functions", "function_call", "audio",
                           "prediction", "reasoning_effort", "web_search_options"}) {
    fields.refuse(name);
  }
  fields.refuse("verbosity", "medium");
  fields.refuse("modalities", Json::array({"text"}));
  fields.refuse("response_format", Json{{"type", "text"}});
  fields.ignore("parallel_tool_calls");
  const std::vector<ChatMessage> messages = read_messages(fields);
  fields.finish();
  std::string text;
  try {
    text = context.chat->prompt(messages);
  } catch (const Error& error) {
    throw bad_field("messages", error.what());
  }
  add_text(request, context, text, !context.chat->has_bos());
  const std::vector<std::int32_t>& prompt = request.prompts.front();
  check_length(context, prompt, max_tokens.value_or(1), "messages");
  request.base.max_tokens = static_cast<std::int32_t>(
      max_tokens.value_or(context.context - static_cast<std::int64_t>(prompt.size())));
  request.base.stop_tokens = context.chat->stop_tokens();
  for (std::string& stop : context.chat->stops()) request.stops.push_back(std::move(stop));
  return request;
}

}  // namespace twilight::server
