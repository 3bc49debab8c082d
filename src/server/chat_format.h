#ifndef TWILIGHT_SERVER_CHAT_FORMAT_H_
#define TWILIGHT_SERVER_CHAT_FORMAT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "twilight/engine.h"

namespace twilight::server {

/// How a conversation becomes a prompt. Const and thread-safe.
class ChatFormat {
 public:
  virtual ~ChatFormat();
  /// Text that the model continues with the assistant's next message. Throws Error for messages it
  /// cannot express.
  [[nodiscard]] virtual std::string prompt(const std::vector<ChatMessage>& messages) const = 0;
  /// Where the assistant's message ends, beside the model's end tokens.
  [[nodiscard]] virtual std::vector<std::string> stops() const = 0;
  /// Tokens that end it; not shown.
  [[nodiscard]] virtual std::vector<std::int32_t> stop_tokens() const = 0;
  /// Whether `prompt` begins with the model's first token spelled out.
  [[nodiscard]] virtual bool has_bos() const = 0;
  /// Whether white space that the message begins with belongs to the format.
  [[nodiscard]] virtual bool strips_leading() const = 0;
  /// One word for /health and logs.
  [[nodiscard]] virtual std::string name() const = 0;
};

/// "User: ...\n\nAssistant:" for models without a template of their own.
[[nodiscard]] std::unique_ptr<ChatFormat> plain_chat_format();
/// The model's own template where it has a known one, else the plain format.
[[nodiscard]] std::unique_ptr<ChatFormat> chat_format_of(const Model& model);

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_CHAT_FORMAT_H_
