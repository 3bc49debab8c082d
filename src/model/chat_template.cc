#include "model/chat_template.h"

#include <algorithm>
#include <array>
#include <filesystem>

#include "core/check.h"
#include "core/mapped_file.h"
#include "model/json_reader.h"

namespace twilight {
namespace {

constexpr std::array<std::string_view, 8> kFamilies = {
    "chatml", "gemma", "llama-2", "llama-3", "mistral-v1", "mistral-v3", "vicuna", "zephyr"};
constexpr std::string_view kVicunaSystem =
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.";

bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

std::string_view trimmed(std::string_view text, std::string_view blank = " \t\n\v\f\r") {
  const std::size_t begin = text.find_first_not_of(blank);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(blank) - begin + 1);
}

// The text between `open` and `close` where they stand in one quoted literal, \n undone.
std::optional<std::string> literal_between(std::string_view jinja, std::string_view open,
                                           std::string_view close) {
  for (std::size_t at = jinja.find(open); at != std::string_view::npos;
       at = jinja.find(open, at + 1)) {
    const std::size_t begin = at + open.size();
    const std::size_t end = jinja.find(close, begin);
    if (end == std::string_view::npos) return std::nullopt;
    std::string_view text = jinja.substr(begin, end - begin);
    if (has(text, "{{") || has(text, "' +") || has(text, "\" +") || has(text, "%}")) continue;
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const bool newline = text.substr(i, 2) == "\\n";
      const bool quote = text.substr(i, 2) == "\\'" || text.substr(i, 2) == "\\\"";
      if (newline || quote) ++i;
      out += newline ? '\n' : text[i];
    }
    return out;
  }
  return std::nullopt;
}

}  // namespace

std::string ChatTemplate::family_names() {
  std::string out;
  for (const std::string_view name : kFamilies)
    out += (out.empty() ? "" : ", ") + std::string(name);
  return out;
}

void ChatTemplate::set_chatml() {
  family_ = "chatml";
  end_of_turn_ = "<|im_end|>";
  system_ = {"<|im_start|>system\n", "<|im_end|>\n"};
  user_ = {"<|im_start|>user\n", "<|im_end|>\n"};
  assistant_ = {"<|im_start|>assistant\n", "<|im_end|>\n"};
  generation_ = assistant_.open;
}

void ChatTemplate::set_llama3() {
  family_ = "llama-3";
  end_of_turn_ = "<|eot_id|>";
  const auto turn = [](const std::string& role) {
    return Turn{"<|start_header_id|>" + role + "<|end_header_id|>\n\n", "<|eot_id|>", true};
  };
  system_ = turn("system");
  user_ = turn("user");
  assistant_ = turn("assistant");
  generation_ = assistant_.open;
}

void ChatTemplate::set_llama2(const std::string& bos, const std::string& eos) {
  family_ = "llama-2";
  end_of_turn_ = eos;
  begin_.clear();  // every user turn has its own
  system_ = {"<<SYS>>\n", "\n<</SYS>>\n\n"};
  user_ = {bos + "[INST] ", " [/INST]", true};
  assistant_ = {" ", " " + eos, true};
  system_place_ = SystemPlace::kFirstUser;
  alternates_ = true;
  trims_joined_ = true;
}

void ChatTemplate::set_mistral(const std::string& eos) {
  family_ = "mistral-v1";
  end_of_turn_ = eos;
  system_ = {"", "\n\n"};
  user_ = {"[INST] ", " [/INST]"};
  assistant_ = {"", eos};
  system_place_ = SystemPlace::kFirstUser;
  alternates_ = true;
}

void ChatTemplate::set_vicuna(const std::string& eos) {
  family_ = "vicuna";
  end_of_turn_ = eos;
  system_ = {"", " "};
  user_ = {"USER: ", " "};
  assistant_ = {"ASSISTANT: ", eos};
  generation_ = "ASSISTANT:";
  default_system_ = kVicunaSystem;
  alternates_ = true;
}

void ChatTemplate::set_zephyr(const std::string& eos) {
  family_ = "zephyr";
  end_of_turn_ = eos;
  system_ = {"<|system|>\n", eos + "\n"};
  user_ = {"<|user|>\n", eos + "\n"};
  assistant_ = {"<|assistant|>\n", eos + "\n"};
  generation_ = "<|assistant|>\n";
}

void ChatTemplate::set_gemma() {
  family_ = "gemma";
  end_of_turn_ = "<end_of_turn>";
  system_ = {"", "\n\n"};
  user_ = {"<start_of_turn>user\n", "<end_of_turn>\n", true};
  assistant_ = {"<start_of_turn>model\n", "<end_of_turn>\n", true};
  generation_ = assistant_.open;
  system_place_ = SystemPlace::kFirstUser;
  alternates_ = true;
}

void ChatTemplate::read_chatml(std::string_view jinja) {
  set_chatml();
  default_system_ = literal_between(jinja, "<|im_start|>system\\n", "<|im_end|>");
  if (!default_system_) {
    default_system_ = literal_between(jinja, "<|im_start|>system\n", "<|im_end|>");
  }
  thinks_ = has(jinja, "</think>");
}

void ChatTemplate::read_llama3(std::string_view jinja) {
  set_llama3();
  constexpr std::string_view kKnowledge = "Cutting Knowledge Date: December 2023";
  if (!has(jinja, kKnowledge)) return;
  const std::string date = literal_between(jinja, "date_string = \"", "\"").value_or("26 Jul 2024");
  system_.open += std::string(kKnowledge) + "\nToday Date: " + date + "\n\n";
  default_system_ = "";
}

void ChatTemplate::read_mistral(std::string_view jinja, const std::string& eos) {
  set_mistral(eos);
  const std::size_t open = jinja.find("[INST]");
  const bool space_around = open > 0 && jinja[open - 1] == ' ';
  const bool space_after = jinja.substr(open + 6, 1) == " ";
  user_.open = std::string(space_around ? " " : "") + "[INST]" + (space_after ? " " : "");
  if (!has(jinja, " [/INST]")) {
    family_ = "mistral-v3";
    user_.close = "[/INST]";
  }
  const bool space_before_answer = has(jinja, "' ' + message") || has(jinja, "\" \" + message");
  if (space_before_answer) assistant_.open = " ";
  if (has(jinja, "eos_token + ' '")) assistant_.close += ' ';
  assistant_.trim = has(jinja, "|trim + eos_token") || has(jinja, "| trim + eos_token");
  if (!has(jinja, "system")) {
    system_place_ = SystemPlace::kRefused;
  } else if (has(jinja, "loop.last")) {
    system_place_ = SystemPlace::kLastUser;
  }
}

void ChatTemplate::read_vicuna(std::string_view jinja, const std::string& eos) {
  set_vicuna(eos);
  if (!has(jinja, kVicunaSystem.substr(0, 40))) default_system_.reset();
  const bool trim = has(jinja, "strip()") || has(jinja, "trim");
  if (has(jinja, "' USER: '")) {
    system_.close = "";
    user_ = {" USER: ", "", trim};
    assistant_ = {" ASSISTANT: ", eos, trim};
    generation_ = " ASSISTANT:";
  } else {
    system_ = {"", "\n\n", trim};
    user_ = {"USER: ", "\n", trim};
    assistant_ = {"ASSISTANT: ", eos + "\n", trim};
  }
}

ChatTemplate ChatTemplate::detect(std::string_view jinja, const std::string& bos,
                                  const std::string& eos) {
  ChatTemplate out;
  if (has(jinja, "bos_token") || has(jinja, "<bos>")) out.begin_ = bos;
  if (has(jinja, "<|start_header_id|>")) {
    out.read_llama3(jinja);
  } else if (has(jinja, "<|im_start|>") && !has(jinja, "<|im_sep|>")) {
    out.read_chatml(jinja);
  } else if (has(jinja, "<<SYS>>")) {
    out.set_llama2(bos, eos);
  } else if (has(jinja, "[INST]") && !has(jinja, "[SYSTEM_PROMPT]")) {
    out.read_mistral(jinja, eos);
  } else if (has(jinja, "<start_of_turn>")) {
    out.set_gemma();
    if (!has(jinja, "first_user_prefix")) out.system_place_ = SystemPlace::kRefused;
  } else if (has(jinja, "<|user|>") && has(jinja, "<|assistant|>") && has(jinja, "eos_token") &&
             !has(jinja, "<|end|>")) {
    out.set_zephyr(eos);
  } else if (has(jinja, "USER: ") && has(jinja, "ASSISTANT: ")) {
    out.read_vicuna(jinja, eos);
  } else {
    fail(ErrorCode::kUnsupported, "chat template", "unknown template, got ",
         quote_name(jinja.substr(0, 80)), ", accepted those of ", family_names());
  }
  return out;
}

ChatTemplate ChatTemplate::named(std::string_view family, const std::string& bos,
                                 const std::string& eos) {
  ChatTemplate out;
  out.begin_ = bos;
  if (family == "chatml") {
    out.begin_.clear();
    out.set_chatml();
  } else if (family == "llama-3") {
    out.set_llama3();
  } else if (family == "llama-2") {
    out.set_llama2(bos, eos);
  } else if (family == "mistral-v1") {
    out.set_mistral(eos);
  } else if (family == "mistral-v3") {
    out.set_mistral(eos);
    out.family_ = family;
    out.user_.close = "[/INST]";
    out.assistant_ = {" ", eos, true};
    out.system_place_ = SystemPlace::kLastUser;
  } else if (family == "vicuna") {
    out.set_vicuna(eos);
  } else if (family == "zephyr") {
    out.begin_.clear();
    out.set_zephyr(eos);
  } else if (family == "gemma") {
    out.set_gemma();
  } else {
    fail(ErrorCode::kInvalidArgument, "chat template", "name, got ", quote_name(family),
         ", accepted ", family_names());
  }
  return out;
}

void ChatTemplate::check_roles(std::span<const ChatTurn> messages) const {
  require(!messages.empty(), "chat", "messages, got none, accepted one or more");
  std::size_t turns = 0;
  for (const ChatTurn& message : messages) {
    const bool system = message.role == "system";
    require(system || message.role == "user" || message.role == "assistant", "chat", "role, got ",
            quote_name(message.role), ", accepted system, user, assistant");
    require(!system || system_place_ != SystemPlace::kRefused, "chat",
            "role, got 'system', accepted user, assistant: the model's template has no system "
            "message");
    const bool moved = alternates_ || system_place_ != SystemPlace::kTurn || default_system_;
    require(!system || !moved || &message == messages.data(), "chat",
            "a system message, got one after others, accepted the first message only");
    if (system || !alternates_) continue;
    require((turns % 2 == 0) == (message.role == "user"), "chat", "order of roles, got '",
            message.role, "' as turn ", turns + 1,
            ", accepted user and assistant in turns, the user first");
    ++turns;
  }
  require(!alternates_ || turns > 0, "chat", "turns, got none, accepted one of the user at least");
}

// Thoughts stay in the turns after the last question only.
std::string ChatTemplate::thinking_turn(std::string content, bool after_question, bool last) const {
  constexpr std::string_view kBegin = "<think>";
  constexpr std::string_view kEnd = "</think>";
  std::string thoughts;
  if (const std::size_t end = content.find(kEnd); end != std::string::npos) {
    const std::string before = content.substr(0, end);
    const std::size_t begin = before.rfind(kBegin);
    thoughts = trimmed(
        std::string_view(before).substr(begin == std::string::npos ? 0 : begin + kBegin.size()),
        "\n");
    content.erase(0, content.rfind(kEnd) + kEnd.size());
    content.erase(0, std::min(content.find_first_not_of('\n'), content.size()));
  }
  if (!after_question || (!last && thoughts.empty())) return content;
  content.erase(0, std::min(content.find_first_not_of('\n'), content.size()));
  return cat(kBegin, '\n', thoughts, '\n', kEnd, "\n\n", content);
}

std::string ChatTemplate::render(std::span<const ChatTurn> messages,
                                 bool add_generation_prompt) const {
  check_roles(messages);
  std::string out = begin_;
  const auto put = [&](const Turn& turn, std::string_view content) {
    out += turn.open;
    out += turn.trim ? trimmed(content) : content;
    out += turn.close;
  };
  const bool in_turn = system_place_ == SystemPlace::kTurn;
  const bool given = messages.front().role == "system";
  if (in_turn && !given && default_system_) put(system_, *default_system_);
  std::size_t last_user = 0;
  std::size_t first_user = messages.size();
  for (std::size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != "user") continue;
    last_user = i;
    first_user = std::min(first_user, i);
  }
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const ChatTurn& message = messages[i];
    const bool last = i + 1 == messages.size();
    if (message.role == "system") {
      if (in_turn) put(system_, message.content);
    } else if (message.role == "assistant") {
      put(assistant_,
          thinks_ ? thinking_turn(message.content, i > last_user, last) : message.content);
    } else {
      const bool first_place = system_place_ == SystemPlace::kFirstUser && i == first_user;
      const bool last_place = system_place_ == SystemPlace::kLastUser && last;
      std::string content = message.content;
      if (given && (first_place || last_place)) {
        if (user_.trim && !trims_joined_) content = trimmed(content);
        out += user_.open;
        std::string joined = system_.open;
        joined.append(messages.front().content).append(system_.close).append(content);
        out += trims_joined_ ? trimmed(joined) : joined;
        out += user_.close;
      } else {
        put(user_, content);
      }
    }
  }
  if (add_generation_prompt) out += generation_;
  return out;
}

namespace {

// A token as tokenizer_config.json spells it: a text, or an object with `content`.
std::string token_text(const JsonReader& config, const char* field) {
  const nlohmann::json* value = config.find(field);
  if (value == nullptr) return {};
  if (value->is_object()) return config.object(field).string("content").value_or("");
  return config.string(field).value_or("");
}

}  // namespace

std::optional<ChatTemplate> load_chat_template(const std::string& model_dir) {
  const std::filesystem::path folder(model_dir);
  const std::string config_path = (folder / "tokenizer_config.json").string();
  const std::string jinja_path = (folder / "chat_template.jinja").string();
  std::error_code ignored;
  std::optional<std::string> text;
  std::string bos, eos;
  if (std::filesystem::exists(config_path, ignored)) {
    const nlohmann::json document =
        parse_json(read_text_file(config_path), "tokenizer config", config_path);
    const JsonReader config(document, "tokenizer config", config_path);
    bos = token_text(config, "bos_token");
    eos = token_text(config, "eos_token");
    const nlohmann::json* value = config.find("chat_template");
    if (value != nullptr && value->is_array()) {
      for (const nlohmann::json& item : *value) {
        const JsonReader entry(item, "tokenizer config", config_path, "chat_template.");
        if (entry.string("name") == "default") text = entry.string("template");
      }
    } else {
      text = config.string("chat_template");
    }
  }
  if (std::filesystem::exists(jinja_path, ignored)) text = read_text_file(jinja_path);
  if (!text) return std::nullopt;
  return ChatTemplate::detect(*text, bos, eos);
}

}  // namespace twilight
