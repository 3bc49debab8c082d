#include "model/tokenizer/token_decoder.h"

#include <algorithm>
#include <optional>

#include "core/check.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/pre_tokenizer.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

// Value of a token of the form <0xAB>.
std::optional<char> fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  int value = 0;
  for (char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return std::nullopt;
    value = value * 16 + digit;
  }
  return static_cast<char>(value);
}

// A chain of Replace steps can grow a token exponentially; no real decoder comes near this.
constexpr std::size_t kMaxTokenBytes = std::size_t{1} << 20;

std::string replace_in_token(std::string_view token, std::string_view from, std::string_view to) {
  std::string out = replace_all(token, from, to);
  if (out.size() > kMaxTokenBytes && out.size() > token.size()) {
    fail(ErrorCode::kInvalidFile, "tokenizer", "token after decoding, got ", out.size(),
         " bytes, accepted at most ", kMaxTokenBytes);
  }
  return out;
}

std::string strip(std::string_view text, std::string_view content, std::size_t left,
                  std::size_t right) {
  for (; left > 0 && text.starts_with(content); --left) text.remove_prefix(content.size());
  for (; right > 0 && text.ends_with(content); --right) text.remove_suffix(content.size());
  return std::string(text);
}

std::string join(const std::vector<std::string>& tokens, std::string_view between) {
  std::string out;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += between;
    out += tokens[i];
  }
  return out;
}

// A run of byte tokens that is no valid UTF-8 becomes one U+FFFD per byte.
std::vector<std::string> join_bytes(const std::vector<std::string>& tokens) {
  std::vector<std::string> out;
  std::string run;
  const auto flush = [&] {
    if (run.empty()) return;
    if (is_valid_utf8(run)) {
      out.push_back(run);
    } else {
      out.insert(out.end(), run.size(), std::string(kReplacementCharacter));
    }
    run.clear();
  };
  for (const std::string& token : tokens) {
    if (const auto byte = fallback_byte(token)) {
      run += *byte;
    } else {
      flush();
      out.push_back(token);
    }
  }
  flush();
  return out;
}

}  // namespace

void TokenDecoder::add(const JsonField& field, int depth) {
  const std::string& type = field.at("type").string();
  if (type == "Sequence") {
    if (depth == kMaxSequenceDepth) field.reject("Sequences nested at most 8 deep");
    const JsonField list = field.at("decoders");
    for (std::size_t i = 0; i < list.array_size(); ++i) add(list.element(i), depth + 1);
  } else if (type == "ByteLevel") {
    steps_.push_back({Kind::kByteLevel, {}, {}});
  } else if (type == "ByteFallback") {
    steps_.push_back({Kind::kByteFallback, {}, {}});
  } else if (type == "Fuse") {
    steps_.push_back({Kind::kFuse, {}, {}});
  } else if (type == "Metaspace") {
    Step step{Kind::kMetaspace, field.at("replacement").string(), " "};
    if (step.from.empty() || utf8_length(step.from[0]) != step.from.size()) {
      field.at("replacement").reject("one character");
    }
    step.drops_first_space = field.has("prepend_scheme")
                                 ? field.at("prepend_scheme").string() != "never"
                                 : field.boolean_or("add_prefix_space", true);
    steps_.push_back(std::move(step));
  } else if (type == "Replace") {
    const JsonField pattern = field.at("pattern");
    if (!pattern.has("String")) pattern.unsupported("{\"String\": text}");
    Step step{Kind::kReplace, pattern.at("String").string(), field.at("content").string()};
    if (step.from.empty()) pattern.at("String").reject("a string that is not empty");
    steps_.push_back(std::move(step));
  } else if (type == "Strip") {
    Step step{Kind::kStrip, field.at("content").string(), {}};
    if (step.from.empty()) field.at("content").reject("one character");
    step.left = static_cast<std::size_t>(field.at("start").index_below(1 << 30));
    step.right = static_cast<std::size_t>(field.at("stop").index_below(1 << 30));
    steps_.push_back(std::move(step));
  } else {
    field.at("type").unsupported(
        "ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip, Sequence");
  }
}

void TokenDecoder::run(const Step& step, std::vector<std::string>& tokens) {
  switch (step.kind) {
    case Kind::kByteLevel: {
      std::string bytes;
      for (const std::string& token : tokens) bytes += byte_level_to_bytes(token);
      tokens = {replace_invalid_utf8(bytes)};
      break;
    }
    case Kind::kMetaspace:
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const bool drop = i == 0 && step.drops_first_space;
        tokens[i] = replace_all(tokens[i], step.from, drop ? "" : step.to);
      }
      break;
    case Kind::kReplace:
      for (std::string& token : tokens) token = replace_in_token(token, step.from, step.to);
      break;
    case Kind::kByteFallback:
      tokens = join_bytes(tokens);
      break;
    case Kind::kFuse:
      tokens = {join(tokens, "")};
      break;
    case Kind::kStrip:
      for (std::string& token : tokens) token = strip(token, step.from, step.left, step.right);
      break;
  }
}

std::string TokenDecoder::decode(std::vector<std::string> tokens) const {
  if (steps_.empty()) return join(tokens, " ");
  for (const Step& step : steps_) run(step, tokens);
  return join(tokens, "");
}

std::string TokenDecoder::literal(std::string_view text) const {
  const bool byte_level = std::any_of(
      steps_.begin(), steps_.end(), [](const Step& step) { return step.kind == Kind::kByteLevel; });
  if (!byte_level) return std::string(text);
  std::string out;
  for (char c : text) append_utf8(byte_level_alphabet()[static_cast<unsigned char>(c)], out);
  return out;
}

std::string TokenDecoder::token_bytes(std::string_view token) const {
  std::string out(token);
  bool fused = false;
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kByteLevel:
        out = byte_level_to_bytes(out);
        fused = true;
        break;
      case Kind::kMetaspace:
      case Kind::kReplace:
        out = replace_in_token(out, step.from, step.to);
        break;
      case Kind::kByteFallback:
        if (const auto byte = fallback_byte(out)) return std::string(1, *byte);
        break;
      case Kind::kFuse:
        fused = true;
        break;
      case Kind::kStrip:
        // After a Fuse it concerns the ends of the whole text alone.
        if (!fused) out = strip(out, step.from, step.left, step.right);
        break;
    }
  }
  return out;
}

}  // namespace twilight
