#include "server/chat_format.h"

namespace twilight::server {
namespace {

class PlainFormat final : public ChatFormat {
 public:
  std::string prompt(const std::vector<ChatMessage>& messages) const override {
    std::string text;
    for (const ChatMessage& message : messages) {
      text += label(message.role) + ": " + message.content + "\n\n";
    }
    return text + "Assistant:";
  }
  std::vector<std::string> stops() const override { return {"\nUser:", "\nSystem:"}; }
  std::vector<std::int32_t> stop_tokens() const override { return {}; }
  bool has_bos() const override { return false; }
  bool strips_leading() const override { return true; }
  std::string name() const override { return "plain"; }

 private:
  static std::string label(const std::string& role) {
    if (role == "user") return "User";
    return role == "system" ? "System" : "Assistant";
  }
};

class TemplateFormat final : public ChatFormat {
 public:
  explicit TemplateFormat(const Model& model) : model_(model) {}
  std::string prompt(const std::vector<ChatMessage>& messages) const override {
    return model_.chat_prompt(messages);
  }
  std::vector<std::string> stops() const override { return {}; }
  std::vector<std::int32_t> stop_tokens() const override { return model_.chat_stop_tokens(); }
  bool has_bos() const override { return true; }
  bool strips_leading() const override { return false; }
  std::string name() const override { return "template"; }

 private:
  Model model_;
};

}  // namespace

ChatFormat::~ChatFormat() = default;

std::unique_ptr<ChatFormat> plain_chat_format() { return std::make_unique<PlainFormat>(); }

std::unique_ptr<ChatFormat> chat_format_of(const Model& model) {
  if (model.has_chat_template()) return std::make_unique<TemplateFormat>(model);
  return plain_chat_format();
}

}  // namespace twilight::server
