#include <algorithm>
#include <chrono>

#include "core/check.h"
#include "engine/sampler_impl.h"
#include "twilight/engine.h"

namespace twilight {

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kOutOfPages:
      return "out of pages";
  }
  return "unknown";
}

GenerateResult generate(Engine& engine, Sequence& sequence, std::span<const float> logits,
                        const GenerateOptions& options) {
  require(options.max_tokens >= 0, "generate", "max_tokens, got ", options.max_tokens,
          ", accepted 0 or more");
  GenerateResult result;
  Sampler sampler(options.sampling);
  const std::vector<std::int32_t>& eos = engine.model().info().eos_tokens;
  std::int32_t chosen = options.max_tokens > 0 ? sampler.sample(logits) : 0;
  Sequence* const batch[] = {&sequence};
  while (static_cast<std::int32_t>(result.tokens.size()) < options.max_tokens) {
    const std::int32_t token = chosen;
    const auto ends = [&](const std::vector<std::int32_t>& tokens) {
      return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
    };
    if (options.stop_at_eos && (ends(eos) || ends(options.stop_tokens))) {
      result.reason = FinishReason::kStop;
      return result;
    }
    result.tokens.push_back(token);
    if (options.on_token && !options.on_token(token)) {
      result.reason = FinishReason::kCancelled;
      return result;
    }
    if (static_cast<std::int32_t>(result.tokens.size()) == options.max_tokens) break;
    if (sequence.num_tokens() >= engine.options().max_context) break;
    const auto start = std::chrono::steady_clock::now();
    DecodeRow row{.draw = sampler.draw()};
    const Engine::Status status = engine.decode_rows(batch, {&token, 1}, {&row, 1});
    if (status == Engine::Status::kOutOfPages) {
      result.reason = FinishReason::kOutOfPages;
      return result;
    }
    result.decode_seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    ++result.decode_steps;
    if (options.on_step) options.on_step();
    check_drawn(row.token);
    chosen = row.token;
  }
  return result;
}

}  // namespace twilight
