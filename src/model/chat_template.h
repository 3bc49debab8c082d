#ifndef TWILIGHT_MODEL_CHAT_TEMPLATE_H_
#define TWILIGHT_MODEL_CHAT_TEMPLATE_H_

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace twilight {

/// One message of a conversation: who says it ("system", "user" or "assistant"), and what.
struct ChatTurn {
  std::string role, content;
};

/// Texts around what the model reads, one conversation format. Formats are known by name: a
/// checkpoint's Jinja template only tells which one it is, and its default system message. Const
/// and thread-safe.
class ChatTemplate {
 public:
  /// The format a Jinja template writes. `bos` and `eos` are the texts of the model's first and end
  /// token. Throws Error(kUnsupported) naming the known ones.
  [[nodiscard]] static ChatTemplate detect(std::string_view jinja, const std::string& bos,
                                           const std::string& eos);
  /// One of `family_names()`, in its plainest form. Throws Error(kInvalidArgument).
  [[nodiscard]] static ChatTemplate named(std::string_view family, const std::string& bos,
                                          const std::string& eos);
  /// "chatml, gemma, ..."
  [[nodiscard]] static std::string family_names();

  /// The conversation as text, with the first token's text where the format has it. Throws
  /// Error(kInvalidArgument) for a role or an order of roles the format does not know.
  [[nodiscard]] std::string render(std::span<const ChatTurn> messages,
                                   bool add_generation_prompt) const;

  [[nodiscard]] const std::string& family() const { return family_; }
  /// Text of the special token that ends a turn of the assistant.
  [[nodiscard]] const std::string& end_of_turn() const { return end_of_turn_; }

 private:
  struct Turn {
    std::string open, close;
    bool trim = false;  ///< white space around the content goes
  };
  /// Where the system message goes: a turn of its own, or before the content of a user's turn.
  enum class SystemPlace { kTurn, kFirstUser, kLastUser, kRefused };

  ChatTemplate() = default;
  void set_chatml();
  void set_llama3();
  void set_llama2(const std::string& bos, const std::string& eos);
  void set_mistral(const std::string& eos);
  void set_vicuna(const std::string& eos);
  void set_zephyr(const std::string& eos);
  void set_gemma();
  void read_chatml(std::string_view jinja);
  void read_llama3(std::string_view jinja);
  void read_mistral(std::string_view jinja, const std::string& eos);
  void read_vicuna(std::string_view jinja, const std::string& eos);
  void check_roles(std::span<const ChatTurn> messages) const;
  [[nodiscard]] std::string thinking_turn(std::string content, bool after_question,
                                          bool last) const;

  std::string family_, end_of_turn_;
  std::string begin_;  ///< before everything
  Turn system_, user_, assistant_;
  std::string generation_;  ///< what add_generation_prompt adds
  std::optional<std::string> default_system_;
  SystemPlace system_place_ = SystemPlace::kTurn;
  bool alternates_ = false;    ///< user and assistant take turns, the user first
  bool trims_joined_ = false;  ///< user.trim takes the system message and the content together
  bool thinks_ = false;        ///< thoughts of earlier turns are left out
};

/// What a Hugging Face folder says: chat_template.jinja, or chat_template of tokenizer_config.json
/// (a text, or a list of which "default" counts). Nothing where it has neither. Throws
/// Error(kUnsupported) for an unknown template, Error(kInvalidFile) for a malformed file.
[[nodiscard]] std::optional<ChatTemplate> load_chat_template(const std::string& model_dir);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_CHAT_TEMPLATE_H_
