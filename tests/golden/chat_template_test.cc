#include "model/chat_template.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/expect_error.h"
#include "support/temp_dir.h"

namespace twilight::test {
namespace {

nlohmann::json golden() {
  std::ifstream file(TWILIGHT_SOURCE_DIR "/tests/golden/chat/chat.json");
  return nlohmann::json::parse(file);
}

std::vector<ChatTurn> messages_of(const nlohmann::json& list) {
  std::vector<ChatTurn> out;
  for (const auto& item : list) out.push_back({item.at("role"), item.at("content")});
  return out;
}

TEST(ChatTemplate, EqualsTransformers) {
  int rendered = 0;
  int refused = 0;
  for (const auto& family : golden()) {
    const std::string name = family.at("name");
    const ChatTemplate chat = ChatTemplate::detect(family.at("template").get<std::string>(),
                                                   family.at("bos"), family.at("eos"));
    for (const auto& item : family.at("cases")) {
      const auto messages = messages_of(item.at("messages"));
      const bool add = item.at("add_generation_prompt");
      if (item.at("text").is_null()) {
        ++refused;
        expect_error(ErrorCode::kInvalidArgument, {"[chat]"},
                     [&] { (void)chat.render(messages, add); });
        continue;
      }
      ++rendered;
      EXPECT_EQ(chat.render(messages, add), item.at("text").get<std::string>())
          << name << ' ' << item.at("messages").dump();
    }
  }
  EXPECT_GT(rendered, 100);
  EXPECT_GT(refused, 10);
}

TEST(ChatTemplate, NamesEndOfTurn) {
  EXPECT_EQ(ChatTemplate::named("chatml", "", "</s>").end_of_turn(), "<|im_end|>");
  EXPECT_EQ(ChatTemplate::named("llama-3", "", "").end_of_turn(), "<|eot_id|>");
  EXPECT_EQ(ChatTemplate::named("vicuna", "<s>", "</s>").end_of_turn(), "</s>");
}

TEST(ChatTemplate, VicunaByNameIsTheFormOfLongChat) {
  const ChatTurn messages[] = {{"system", "S"}, {"user", "a"}, {"assistant", "b"}, {"user", "c"}};
  EXPECT_EQ(ChatTemplate::named("vicuna", "<s>", "</s>").render(messages, true),
            "<s>S USER: a ASSISTANT: b</s>USER: c ASSISTANT:");
}

TEST(ChatTemplate, RefusesWhatItDoesNotKnow) {
  expect_error(ErrorCode::kUnsupported, {"chat template", "chatml", "zephyr"},
               [] { (void)ChatTemplate::detect("{{ messages[0] }}", "", ""); });
  expect_error(ErrorCode::kUnsupported, {"chat template"},
               [] { (void)ChatTemplate::detect("<|im_start|>user<|im_sep|>", "", ""); });
  expect_error(ErrorCode::kInvalidArgument, {"'alpaca'", "llama-2"},
               [] { (void)ChatTemplate::named("alpaca", "", ""); });
  const ChatTemplate chat = ChatTemplate::named("chatml", "", "");
  const ChatTurn tool[] = {{"tool", "x"}};
  expect_error(ErrorCode::kInvalidArgument, {"role", "'tool'"},
               [&] { (void)chat.render(tool, true); });
  expect_error(ErrorCode::kInvalidArgument, {"messages"}, [&] { (void)chat.render({}, true); });
}

TEST(ChatTemplate, IsReadFromAFolder) {
  const TempDir folder;
  EXPECT_FALSE(load_chat_template(folder.path()).has_value());
  const ChatTurn messages[] = {{"user", "a"}};
  folder.write("tokenizer_config.json",
               R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": [
                   {"name": "tool_use", "template": "?"},
                   {"name": "default", "template": "{{ bos_token }}[INST] ' + x + ' [/INST]"}]})");
  auto chat = load_chat_template(folder.path());
  ASSERT_TRUE(chat.has_value());
  EXPECT_EQ(chat->render(messages, true), "<s>[INST] a [/INST]");
  folder.write("tokenizer_config.json", R"({"chat_template": 3})");
  expect_error(ErrorCode::kInvalidFile, {"chat_template", "got 3"},
               [&] { (void)load_chat_template(folder.path()); });
  folder.write("tokenizer_config.json", R"({"eos_token": "</s>"})");
  folder.write("chat_template.jinja", "<|im_start|>");
  chat = load_chat_template(folder.path());
  ASSERT_TRUE(chat.has_value());
  EXPECT_EQ(chat->family(), "chatml");
}

}  // namespace
}  // namespace twilight::test
