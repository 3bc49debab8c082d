// Request bodies against a real model's vocabulary, and responses.
#include <gtest/gtest.h>

#include <limits>

#include "server/api_request.h"
#include "server/json_fields.h"
#include "server/responses.h"

namespace twilight::server {
namespace {

class RequestTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = new Model(Model::load(TWILIGHT_SOURCE_DIR "/models/vesper-19m"));
    chat_ = plain_chat_format().release();
  }
  static void TearDownTestSuite() {
    delete model_;
    delete chat_;
  }
  static RequestContext context() {
    RequestContext context;
    context.model = model_;
    context.chat = chat_;
    context.model_id = "m";
    context.policy = make_policy("adaptive");
    context.context = 100;
    return context;
  }
  static ApiRequest completion(const char* body) {
    return parse_completion(parse_body(body), context());
  }
  static int refused(const char* body) {
    try {
      (void)completion(body);
    } catch (const ApiError& error) {
      return error.status();
    }
    return 200;
  }

  static Model* model_;
  static ChatFormat* chat_;
};
Model* RequestTest::model_ = nullptr;
ChatFormat* RequestTest::chat_ = nullptr;

TEST_F(RequestTest, Defaults) {
  const ApiRequest request = completion(R"({"prompt": "a"})");
  EXPECT_EQ(request.base.max_tokens, 16);
  EXPECT_EQ(request.base.sampling.temperature, 1);
  EXPECT_EQ(request.base.top_logprobs, -1);
  EXPECT_FALSE(request.base.policy.has_value());
  EXPECT_TRUE(request.bos_added.front());
  EXPECT_EQ(request.prompts.front(), model_->encode("a"));
}

TEST_F(RequestTest, PolicyFields) {
  EXPECT_EQ(completion(R"({"prompt": "a", "attention": "dense"})").base.policy->name, "dense");
  const SparsePolicy own = *completion(R"({"prompt": "a", "attn_p": 0.5})").base.policy;
  EXPECT_EQ(own.name, "adaptive");
  EXPECT_FLOAT_EQ(own.p, 0.5F);
  EXPECT_EQ(completion(R"({"prompt": "a", "attention": "quest:512"})").base.policy->selector,
            "quest");
  EXPECT_EQ(refused(R"({"prompt": "a", "attention": "dense", "attn_p": 0.5})"), 400);
  EXPECT_EQ(refused(R"({"prompt": "a", "attn_p": 0})"), 400);
}

TEST_F(RequestTest, Scoring) {
  const ApiRequest request =
      completion(R"({"prompt": [5, 6], "max_tokens": 1, "echo": true, "logprobs": 1})");
  EXPECT_TRUE(request.base.prompt_logprobs);
  EXPECT_TRUE(request.base.ignore_eos);
  EXPECT_FALSE(completion(R"({"prompt": [5], "max_tokens": 2, "echo": true, "logprobs": 1})")
                   .base.ignore_eos);
}

TEST_F(RequestTest, Lengths) {
  EXPECT_EQ(refused(R"({"prompt": [1, 2], "max_tokens": 98})"), 200);
  EXPECT_EQ(refused(R"({"prompt": [1, 2], "max_tokens": 99})"), 400);
  EXPECT_EQ(refused(R"({"prompt": [1, 2], "max_tokens": 2147483647})"), 400);
  const Json chat = parse_body(R"({"messages": [{"role": "user", "content": "Hi"}]})");
  const ApiRequest request = parse_chat(chat, context());
  EXPECT_EQ(static_cast<std::int32_t>(request.prompts[0].size()) + request.base.max_tokens, 100);
  EXPECT_EQ(request.stops, chat_->stops());
}

TEST(Json, DepthAndText) {
  EXPECT_THROW((void)parse_body(std::string(65, '[') + std::string(65, ']')), ApiError);
  EXPECT_THROW((void)parse_body("[]"), ApiError);
  EXPECT_THROW((void)parse_body("{\"a\": \"\xff\"}"), ApiError);
  EXPECT_EQ(dump(Json("a\xff")), "\"a\xef\xbf\xbd\"");
}

TEST(Responses, LogprobsAreFiniteAndSpelled) {
  std::vector<ChoiceState> choices(1);
  choices[0].tokens.push_back({"a", 0, {}, {}});
  choices[0].tokens.push_back(
      {"\xe2\x80", 1, -std::numeric_limits<float>::infinity(), {{"b", -0.5F}}});
  choices[0].end = ChoiceEnd{EndReason::kLength, false, {}, {}};
  const Json json = response_json({"id", "m", 1, false}, choices, 1, true);
  const Json& logprobs = json["choices"][0]["logprobs"];
  EXPECT_TRUE(logprobs["token_logprobs"][0].is_null());
  EXPECT_EQ(logprobs["token_logprobs"][1], -9999);
  EXPECT_EQ(logprobs["tokens"][1], "bytes:\\xe2\\x80");
  EXPECT_EQ(logprobs["top_logprobs"][1].size(), 2U);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
}

TEST(Responses, PromptsCountOnceInUsage) {
  std::vector<ChoiceState> choices(4);
  for (ChoiceState& choice : choices) {
    choice.end = ChoiceEnd{};
    choice.end->usage.prompt_tokens = 10;
    choice.end->usage.completion_tokens = 3;
    choice.end->usage.kv_bytes_read = 1;
    choice.end->usage.kv_bytes_dense = 4;
  }
  const Json usage = usage_json(choices, 2);
  EXPECT_EQ(usage["prompt_tokens"], 20);
  EXPECT_EQ(usage["completion_tokens"], 12);
  EXPECT_EQ(usage["kv_bytes_ratio"], 0.25);
}

TEST(Responses, FailuresHaveStatus) {
  EXPECT_FALSE(failure({EndReason::kStop, false, {}, {}}).has_value());
  EXPECT_EQ(failure({EndReason::kShutdown, false, {}, {}})->status(), 503);
  EXPECT_EQ(failure({EndReason::kShutdown, false, {}, {}})->retry_after(), 1);
  EXPECT_EQ(failure({EndReason::kError, false, {}, "x"})->status(), 500);
  EXPECT_EQ(failure({EndReason::kDeadline, false, {}, {}})->status(), 504);
}

}  // namespace
}  // namespace twilight::server
