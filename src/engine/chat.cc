#include <algorithm>

#include "core/check.h"
#include "engine/model_impl.h"
#include "twilight/engine.h"

namespace twilight {

ChatTemplate Model::Impl::chat_template(std::string_view family) const {
  if (family.empty()) {
    if (!chat) throw Error(ErrorCode::kUnsupported, no_chat);
    return *chat;
  }
  const auto text_of = [&](std::optional<std::int32_t> id) {
    return id ? text_tokenizer().decode({&*id, 1}) : std::string();
  };
  const std::vector<std::int32_t>& eos = info.eos_tokens;
  return ChatTemplate::named(family, text_of(info.bos_token),
                             eos.empty() ? std::string() : text_of(eos.front()));
}

bool Model::has_chat_template() const { return impl_->chat.has_value(); }

std::string Model::chat_prompt(std::span<const ChatMessage> messages, bool add_generation_prompt,
                               std::string_view family) const {
  std::vector<ChatTurn> turns;
  for (const ChatMessage& message : messages) turns.push_back({message.role, message.content});
  return impl_->chat_template(family).render(turns, add_generation_prompt);
}

std::vector<std::int32_t> Model::chat_stop_tokens(std::string_view family) const {
  const ChatTemplate chat = impl_->chat_template(family);
  std::vector<std::int32_t> out = impl_->info.eos_tokens;
  const auto id = impl_->text_tokenizer().token_to_id(chat.end_of_turn());
  if (id && std::find(out.begin(), out.end(), *id) == out.end()) out.push_back(*id);
  return out;
}

}  // namespace twilight
