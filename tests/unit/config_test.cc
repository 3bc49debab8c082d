#include "model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/expect_error.h"
#include "support/temp_dir.h"

namespace twilight {
namespace {

using nlohmann::json;
using test::expect_error;

const std::string kConfigs = std::string(TWILIGHT_SOURCE_DIR) + "/tests/golden/configs/";

ModelConfig load_golden(const std::string& name) {
  const test::TempDir dir;
  std::ifstream in(kConfigs + name + ".json");
  const std::string text(std::istreambuf_iterator<char>(in), {});
  EXPECT_FALSE(text.empty()) << name;
  dir.write("config.json", text);
  return load_config(dir.path());
}

json small() {
  return {{"architectures", json::array({"LlamaForCausalLM"})},
          {"model_type", "llama"},
          {"hidden_size", 64},
          {"intermediate_size", 128},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 100},
          {"max_position_embeddings", 512},
          {"rms_norm_eps", 1e-5}};
}

ModelConfig parse(const json& document) { return parse_config(document.dump(), "dir/config.json"); }

// Expects the error for `field` = `value`, and that it names the file and the field.
void expect_rejected(const std::string& field, const json& value, const std::string& accepted,
                     ErrorCode code = ErrorCode::kInvalidFile) {
  SCOPED_TRACE(field + " = " + value.dump());
  json document = small();
  document[field] = value;
  expect_error(code, {"[config] dir/config.json: ", field, ", got ", ", accepted ", accepted},
               [&] { (void)parse(document); });
}

TEST(Config, Llama2) {
  const ModelConfig c = load_golden("llama-2-7b-chat");
  EXPECT_EQ(c.architecture, Architecture::kLlama);
  EXPECT_EQ(c.hidden_size, 4096);
  EXPECT_EQ(c.intermediate_size, 11008);
  EXPECT_EQ(c.num_layers, 32);
  EXPECT_EQ(c.num_heads, 32);
  EXPECT_EQ(c.num_kv_heads, 32);
  EXPECT_EQ(c.group_size(), 1);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.vocab_size, 32000);
  EXPECT_EQ(max_context_length(c), 4096);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_FALSE(c.tie_word_embeddings || c.qkv_bias || c.o_bias || c.mlp_bias);
  EXPECT_EQ(c.bos_token_id, 1);
  EXPECT_EQ(c.eos_token_ids, std::vector<int>{2});
  EXPECT_EQ(c.rope.scaling, RopeScaling::kDefault);
  EXPECT_EQ(c.rope.theta, 10000.0);
}

TEST(Config, Llama31) {
  const ModelConfig c = load_golden("llama-3.1-8b-instruct");
  EXPECT_EQ(c.group_size(), 4);
  EXPECT_EQ(c.kv_size(), 1024);
  EXPECT_EQ(max_context_length(c), 131072);
  EXPECT_EQ(c.eos_token_ids, (std::vector<int>{128001, 128008, 128009}));
  EXPECT_EQ(c.rope.scaling, RopeScaling::kLlama3);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.factor, 8.0);
  EXPECT_EQ(c.rope.low_freq_factor, 1.0);
  EXPECT_EQ(c.rope.high_freq_factor, 4.0);
  EXPECT_EQ(c.rope.original_max_positions, 8192);
}

TEST(Config, LongChat) {
  const ModelConfig c = load_golden("longchat-7b-v1.5-32k");
  EXPECT_EQ(c.rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(c.rope.factor, 8.0);
  EXPECT_EQ(c.max_positions, 4096);
  EXPECT_EQ(max_context_length(c), 32768);
}

TEST(Config, Qwen25) {
  const ModelConfig c = load_golden("qwen2.5-7b-instruct");
  EXPECT_EQ(c.architecture, Architecture::kQwen2);
  EXPECT_TRUE(c.qkv_bias);
  EXPECT_FALSE(c.o_bias);
  EXPECT_EQ(c.group_size(), 7);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.rms_norm_eps, 1e-6);
  const ModelConfig half = load_golden("qwen2.5-0.5b-instruct");
  EXPECT_TRUE(half.tie_word_embeddings);
  EXPECT_EQ(half.head_dim, 64);
  EXPECT_EQ(max_context_length(half), 32768);
}

TEST(Config, Mistral) {
  const ModelConfig c = load_golden("mistral-7b-instruct-v0.3");
  EXPECT_EQ(c.architecture, Architecture::kMistral);
  EXPECT_EQ(architecture_name(c.architecture), "MistralForCausalLM");
  EXPECT_FALSE(c.qkv_bias);
}

TEST(Config, BundledModel) {
  const ModelConfig c = load_config(std::string(TWILIGHT_SOURCE_DIR) + "/models/vesper-19m");
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.q_size(), 1024);  // differs from hidden_size, 384
  EXPECT_EQ(c.bos_token_id, 0);
  EXPECT_TRUE(c.tie_word_embeddings);
}

TEST(Config, DefaultsAndOptionalFields) {
  json document = small();
  document.erase("num_key_value_heads");
  document["bos_token_id"] = nullptr;
  ModelConfig c = parse(document);
  EXPECT_EQ(c.num_kv_heads, 4);
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_FALSE(c.bos_token_id.has_value());
  EXPECT_TRUE(c.eos_token_ids.empty());
  EXPECT_FALSE(c.tie_word_embeddings);

  document = small();
  document.erase("architectures");
  EXPECT_EQ(parse(document).architecture, Architecture::kLlama);
  document = small();
  document.erase("model_type");
  EXPECT_EQ(parse(document).architecture, Architecture::kLlama);

  document = small();
  document["attention_bias"] = true;
  document["mlp_bias"] = true;
  c = parse(document);
  EXPECT_TRUE(c.qkv_bias && c.o_bias && c.mlp_bias);

  document = small();
  document["hidden_size"] = 70;  // not a multiple of the heads: fine with an explicit head_dim
  document["head_dim"] = 512;
  EXPECT_EQ(parse(document).head_dim, 512);
}

TEST(Config, RejectsBadSizes) {
  for (const char* field : {"hidden_size", "intermediate_size", "num_hidden_layers",
                            "num_attention_heads", "vocab_size", "max_position_embeddings"}) {
    const std::vector<json> bad = {nullptr,
                                   0,
                                   -4,
                                   64.5,
                                   "64",
                                   true,
                                   1LL << 40,
                                   1e30,
                                   18446744073709551615ULL,
                                   json::array({64}),
                                   json::object()};
    for (const json& value : bad) expect_rejected(field, value, "an integer from 1 to ");
    json document = small();
    document.erase(field);
    expect_error(ErrorCode::kInvalidFile, {field, "got nothing"}, [&] { (void)parse(document); });
  }
  expect_rejected("num_key_value_heads", 3, "a divisor of num_attention_heads, 4");
  expect_rejected("num_key_value_heads", 8, "a divisor of num_attention_heads, 4");
  expect_rejected("num_key_value_heads", 0, "an integer from 1 to ");
  expect_rejected("head_dim", 15, "an even integer from 2 to 512");
  expect_rejected("head_dim", 514, "an integer from 2 to 512");
  expect_rejected("hidden_size", 66, "a multiple of num_attention_heads, 4");
  expect_rejected("hidden_size", 60, "hidden_size / num_attention_heads is 15");
  expect_rejected("hidden_size", 4096, "hidden_size / num_attention_heads is 1024");
}

TEST(Config, RejectsBadValues) {
  for (const json& eps : std::vector<json>{0, -1e-5, 2.0, "1e-5", nullptr, 0.0}) {
    expect_rejected("rms_norm_eps", eps, "a number from ");
  }
  expect_rejected("tie_word_embeddings", 1, "true or false");
  expect_rejected("attention_bias", "no", "true or false");
  expect_rejected("bos_token_id", 100, "an integer from 0 to 99");
  expect_rejected("eos_token_id", -1, "an integer from 0 to 99");
  expect_rejected("eos_token_id", json::array({1, 100}), "an integer from 0 to 99");
  expect_rejected("eos_token_id", json::array({1, "x"}), "an integer from 0 to 99");
  expect_rejected("architectures", "LlamaForCausalLM", "a list of one name");
  expect_rejected("architectures", json::array(), "a list of one name");
  expect_rejected("model_type", "mistral", "'llama' beside LlamaForCausalLM");
  expect_rejected("rope_theta", 1.0, "a number from ");
  expect_rejected("rope_theta", -5, "a number from ");
}

TEST(Config, RejectsOtherForwardPasses) {
  constexpr auto kUnsupported = ErrorCode::kUnsupported;
  expect_rejected("model_type", "gemma", "llama, mistral, qwen2 or qwen3", kUnsupported);
  expect_rejected("architectures", json::array({"MixtralForCausalLM"}), "LlamaForCausalLM, ",
                  kUnsupported);
  expect_rejected("hidden_act", "gelu", "silu", kUnsupported);
  expect_rejected("quantization_config", json::object({{"bits", 4}}), "null", kUnsupported);
  expect_rejected("partial_rotary_factor", 0.5, "1", kUnsupported);
  expect_rejected("layer_types", json::array({"sliding_attention"}), "full_attention");

  json qwen = small();
  qwen["architectures"] = json::array({"Qwen2ForCausalLM"});
  qwen["model_type"] = "qwen2";
  qwen["use_sliding_window"] = true;
  expect_error(kUnsupported, {"use_sliding_window, got true"}, [&] { (void)parse(qwen); });
}

TEST(Config, ASlidingWindowLimitsTheContext) {
  json mistral = small();
  mistral["architectures"] = json::array({"MistralForCausalLM"});
  mistral["model_type"] = "mistral";
  EXPECT_EQ(max_context_length(parse(mistral)), 512);
  mistral["sliding_window"] = nullptr;
  EXPECT_EQ(max_context_length(parse(mistral)), 512);
  mistral["sliding_window"] = 512;  // the whole context: hides nothing
  EXPECT_FALSE(parse(mistral).sliding_window.has_value());
  mistral["sliding_window"] = 256;
  EXPECT_EQ(parse(mistral).sliding_window, 256);
  EXPECT_EQ(max_context_length(parse(mistral)), 256);

  json qwen = small();
  qwen["architectures"] = json::array({"Qwen2ForCausalLM"});
  qwen["model_type"] = "qwen2";
  qwen["sliding_window"] = 256;
  qwen["use_sliding_window"] = false;
  EXPECT_TRUE(parse(qwen).qkv_bias);
  EXPECT_EQ(max_context_length(parse(qwen)), 512);
  qwen["use_sliding_window"] = true;
  EXPECT_EQ(max_context_length(parse(qwen)), 256);
}

TEST(Config, Qwen3NormsItsHeads) {
  json qwen = small();
  qwen["architectures"] = json::array({"Qwen3ForCausalLM"});
  qwen["model_type"] = "qwen3";
  ModelConfig c = parse(qwen);
  EXPECT_EQ(architecture_name(c.architecture), "Qwen3ForCausalLM");
  EXPECT_TRUE(c.qk_norm);
  EXPECT_FALSE(c.qkv_bias || c.o_bias);
  EXPECT_EQ(c.head_dim, 128);  // of the architecture where the file names none
  qwen["head_dim"] = 32;
  EXPECT_EQ(parse(qwen).head_dim, 32);
  EXPECT_FALSE(parse(small()).qk_norm);
}

TEST(Config, RejectsBadJson) {
  const auto bad = [](const std::string& text, const std::string& part) {
    SCOPED_TRACE(text.substr(0, 60));
    expect_error(ErrorCode::kInvalidFile, {"[config] dir/config.json: ", part},
                 [&] { (void)parse_config(text, "dir/config.json"); });
  };
  bad("", "not valid JSON");
  bad("{\"hidden_size\": 64,", "not valid JSON");
  bad("{\"a\": \"\n\"}", "not valid JSON");
  bad("{\"a\": \"\xff\"}", "not valid JSON");
  bad("[]", "accepted an object");
  bad("7", "got 7, accepted an object");
  bad(R"({"hidden_size": 1, "hidden_size": 2})", "key 'hidden_size', got it twice");
  bad(R"({"a": {"x": 1, "b": {}, "x": 2}})", "key 'x', got it twice");
  bad(std::string(100000, '['), "nesting");
  const test::TempDir dir;
  expect_error(ErrorCode::kNotFound, {dir.path() + "/config.json"},
               [&] { (void)load_config(dir.path()); });
}

TEST(Rope, ReadsEveryForm) {
  json document = small();
  document["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  EXPECT_EQ(parse(document).rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(max_context_length(parse(document)), 2048);
  document["rope_scaling"] = {{"rope_type", "linear"}, {"type", "linear"}, {"factor", 4.0}};
  EXPECT_EQ(parse(document).rope.factor, 4.0);
  document["rope_scaling"] = json::object({{"rope_type", "default"}});
  EXPECT_EQ(parse(document).rope.scaling, RopeScaling::kDefault);
  document["rope_scaling"] = nullptr;
  document["rope_parameters"] = {
      {"rope_theta", 500000.0},  {"rope_type", "llama3"},
      {"factor", 8.0},           {"low_freq_factor", 1.0},
      {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  EXPECT_EQ(parse(document).rope.theta, 500000.0);
  EXPECT_EQ(rope_scaling_name(parse(document).rope.scaling), "llama3");
  document["rope_parameters"] = json::object({{"rope_theta", 2e6}});
  EXPECT_EQ(parse(document).rope.theta, 2e6);
  EXPECT_EQ(parse(document).rope.scaling, RopeScaling::kDefault);
}

TEST(Rope, RejectsBadForms) {
  constexpr auto kUnsupported = ErrorCode::kUnsupported;
  expect_rejected("rope_scaling", "linear", "an object");
  expect_rejected("rope_scaling", json::object({{"factor", 2.0}}), "default, linear or llama3");
  expect_rejected("rope_scaling", json::object({{"type", "yarn"}, {"factor", 2.0}}),
                  "default, linear or llama3", kUnsupported);
  expect_rejected("rope_scaling", json::object({{"rope_type", "dynamic"}}),
                  "default, linear or llama3", kUnsupported);
  expect_rejected("rope_scaling", json::object({{"type", "linear"}}), "a number from 1 to");
  expect_rejected("rope_scaling", json::object({{"type", "linear"}, {"factor", 0.5}}),
                  "a number from 1 to");
  expect_rejected("rope_scaling", json::object({{"type", "linear"}, {"rope_type", "llama3"}}),
                  "the same as rope_type, 'llama3'");
  json llama3 = {{"rope_type", "llama3"},
                 {"factor", 8.0},
                 {"low_freq_factor", 1.0},
                 {"high_freq_factor", 4.0},
                 {"original_max_position_embeddings", 8192}};
  for (const char* field :
       {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    json broken = llama3;
    broken.erase(field);
    expect_rejected("rope_scaling", broken, "from ");
  }
  llama3["high_freq_factor"] = 1.0;
  expect_rejected("rope_scaling", llama3, "a number greater than low_freq_factor, 1");

  json document = small();
  document["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  document["rope_parameters"] = json::object({{"rope_theta", 10000.0}});
  expect_error(ErrorCode::kInvalidFile, {"rope_scaling", "null beside rope_parameters"},
               [&] { (void)parse(document); });
  document["rope_scaling"] = nullptr;
  document["rope_theta"] = 5e5;
  expect_error(ErrorCode::kInvalidFile, {"rope_theta", "the same as rope_parameters.rope_theta"},
               [&] { (void)parse(document); });
}

TEST(Rope, DefaultFrequencies) {
  const auto f = rope_inverse_frequencies(load_golden("llama-2-7b-chat"));
  ASSERT_EQ(f.size(), 64U);
  for (std::size_t i = 0; i < f.size(); ++i) {
    const double want = std::exp(-std::log(10000.0) * static_cast<double>(i) / 64.0);
    EXPECT_NEAR(f[i], want, want * 6e-8) << i;
  }
}

TEST(Rope, LinearFrequencies) {
  const auto f = rope_inverse_frequencies(load_golden("longchat-7b-v1.5-32k"));
  ASSERT_EQ(f.size(), 64U);
  EXPECT_EQ(f[0], 0.125F);
  EXPECT_FLOAT_EQ(f[1], 0.10824554413557053F);
  EXPECT_FLOAT_EQ(f[63], 1.4434775039262604e-05F);
}

// Values from the formula in its wavelength form, evaluated in float64 outside this program.
TEST(Rope, Llama3Frequencies) {
  const auto f = rope_inverse_frequencies(load_golden("llama-3.1-8b-instruct"));
  ASSERT_EQ(f.size(), 64U);
  const std::vector<std::pair<std::size_t, float>> want = {{0, 1.0F},
                                                           {1, 0.8146172165870667F},
                                                           {20, 0.016560440883040428F},
                                                           {28, 0.0032114461064338684F},
                                                           {29, 0.0021665708627551794F},
                                                           {30, 0.0013718935661017895F},
                                                           {31, 0.0008567514014430344F},
                                                           {32, 0.000524846138432622F},
                                                           {33, 0.00031269373721443117F},
                                                           {34, 0.00017850780568551272F},
                                                           {35, 9.556212171446532e-05F},
                                                           {36, 7.784655463183299e-05F},
                                                           {40, 3.428102354519069e-05F},
                                                           {63, 3.068925877869333e-07F}};
  for (const auto& [i, value] : want) EXPECT_FLOAT_EQ(f[i], value) << i;
}

TEST(Rope, RejectsOddHeadDim) {
  for (const int head_dim : {0, -2, 7}) {
    expect_error(ErrorCode::kInvalidArgument, {"head_dim, got ", "accepted a positive even number"},
                 [&] { (void)rope_inverse_frequencies(RopeConfig{}, head_dim); });
  }
}

}  // namespace
}  // namespace twilight
