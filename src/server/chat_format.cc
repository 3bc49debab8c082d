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
  bool has_bos() const override { return false; }
  bool strips_leading() const override { return true; }
  std::string name() const override { return "plain"; }

 private:
  static std::string label(const std::string& role) {
    if (role == "user") return "User";
    return role == "system" ? "System" : "Assistant";
  }
};

}  // namespace

ChatFormat::~ChatFormat() = default;

std::unique_ptr<ChatFormat> plain_chat_format() { return std::make_unique<PlainFormat>(); }

}  // namespace twilight::server
