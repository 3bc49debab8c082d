#include "model/weights.h"
#include "core/thread_pool.h"
#include "model/expand_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/float16.h"
#include "model/finite_scan.h"
#include "support/expect_error.h"
#include "support/safetensors_writer.h"
#include "support/temp_dir.h"

namespace twilight {
namespace {

using test::expect_error;
using test::SafetensorsWriter;
using test::TempDir;

const std::string kSource = TWILIGHT_SOURCE_DIR;

struct Tensor {
  std::string dtype = "F32";
  std::vector<std::int64_t> shape;
  std::string bytes;
};
using Tensors = std::map<std::string, Tensor>;

Tensor filled(const std::string& dtype, const std::vector<std::int64_t>& shape, float value) {
  std::int64_t elements = 1;
  for (const auto size : shape) elements *= size;
  Tensor out{dtype, shape, {}};
  for (std::int64_t i = 0; i < elements; ++i) {
    char raw[4];
    std::memcpy(raw, &value, 4);
    std::size_t size = 4;
    if (dtype != "F32") {
      const std::uint16_t half = dtype == "F16" ? f32_to_f16(value) : f32_to_bf16(value);
      std::memcpy(raw, &half, 2);
      size = 2;
    }
    out.bytes.append(raw, size);
  }
  return out;
}

ModelConfig small_config() {
  ModelConfig c;
  c.hidden_size = 8;
  c.intermediate_size = 12;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 6;
  c.vocab_size = 10;
  c.max_positions = 64;
  c.rms_norm_eps = 1e-5;
  return c;
}

Tensors small_tensors(const ModelConfig& c) {
  Tensors t;
  const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    t[name] = filled("F32", shape, 0.5F);
  };
  add("model.embed_tokens.weight", {10, 8});
  add("model.norm.weight", {8});
  if (!c.tie_word_embeddings) add("lm_head.weight", {10, 8});
  for (int i = 0; i < c.num_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + '.';
    add(layer + "input_layernorm.weight", {8});
    add(layer + "post_attention_layernorm.weight", {8});
    add(layer + "self_attn.q_proj.weight", {24, 8});
    add(layer + "self_attn.k_proj.weight", {12, 8});
    add(layer + "self_attn.v_proj.weight", {12, 8});
    add(layer + "self_attn.o_proj.weight", {8, 24});
    add(layer + "mlp.gate_proj.weight", {12, 8});
    add(layer + "mlp.up_proj.weight", {12, 8});
    add(layer + "mlp.down_proj.weight", {8, 12});
    if (c.qkv_bias) {
      add(layer + "self_attn.q_proj.bias", {24});
      add(layer + "self_attn.k_proj.bias", {12});
      add(layer + "self_attn.v_proj.bias", {12});
    }
    if (c.o_bias) add(layer + "self_attn.o_proj.bias", {8});
    if (c.mlp_bias) {
      add(layer + "mlp.gate_proj.bias", {12});
      add(layer + "mlp.up_proj.bias", {12});
      add(layer + "mlp.down_proj.bias", {8});
    }
  }
  return t;
}

ModelWeights load(const Tensors& tensors, const ModelConfig& config,
                  const LoadOptions& options = {}) {
  SafetensorsWriter writer;
  for (const auto& [name, tensor] : tensors) {
    writer.add(name, tensor.dtype, tensor.shape, tensor.bytes);
  }
  const TempDir dir;  // unlinked on return; the mapping keeps the contents
  dir.write("model.safetensors", writer.file());
  return load_weights(dir.path(), config, options);
}

TEST(Weights, FindsEveryTensor) {
  const ModelConfig config = small_config();
  Tensors tensors = small_tensors(config);
  tensors["model.layers.1.self_attn.k_proj.weight"] = filled("BF16", {12, 8}, -3.0F);
  tensors["lm_head.weight"] = filled("F16", {10, 8}, 1.0F);
  const ModelWeights w = load(tensors, config);
  ASSERT_EQ(w.layers.size(), 2U);
  EXPECT_EQ(w.layers[1].k_proj.type, WeightType::kBf16);
  EXPECT_EQ(w.layers[0].k_proj.type, WeightType::kF32);
  EXPECT_EQ(w.lm_head.type, WeightType::kF16);
  EXPECT_EQ(w.layers[0].down_proj.shape, (std::vector<std::int64_t>{8, 12}));
  EXPECT_FALSE(w.layers[0].q_bias);
  EXPECT_FALSE(w.layers[0].down_bias);
  std::uint16_t half = 0;
  std::memcpy(&half, w.layers[1].k_proj.data, 2);
  EXPECT_EQ(bf16_to_f32(half), -3.0F);
  const std::int64_t layer = 8 * 2 + 24 * 8 * 2 + 12 * 8 * 2 + 12 * 8 * 3;
  EXPECT_EQ(w.parameters, 2 * layer + 2 * 80 + 8);
  EXPECT_EQ(w.bytes, 4 * w.parameters - 2 * (96 + 80));
}

TEST(Weights, ReadsBiases) {
  ModelConfig config = small_config();
  config.qkv_bias = config.o_bias = config.mlp_bias = true;
  const ModelWeights w = load(small_tensors(config), config);
  EXPECT_EQ(w.layers[1].q_bias.shape, std::vector<std::int64_t>{24});
  EXPECT_EQ(w.layers[1].v_bias.name, "model.layers.1.self_attn.v_proj.bias");
  EXPECT_TRUE(w.layers[0].o_bias && w.layers[0].gate_bias && w.layers[0].up_bias &&
              w.layers[0].down_bias);
}

TEST(Weights, TiesEmbeddings) {
  ModelConfig config = small_config();
  config.tie_word_embeddings = true;
  Tensors tensors = small_tensors(config);
  const ModelWeights w = load(tensors, config);
  EXPECT_EQ(w.lm_head.data, w.embed.data);
  tensors["lm_head.weight"] = filled("F32", {10, 8}, 7.0F);  // as some files carry it: passed over
  const ModelWeights both = load(tensors, config);
  EXPECT_EQ(both.lm_head.data, both.embed.data);
  EXPECT_EQ(both.parameters, w.parameters);
}

TEST(Weights, PassesOverRotaryTables) {
  const ModelConfig config = small_config();
  Tensors tensors = small_tensors(config);
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = filled("F32", {3}, 1.0F);
  EXPECT_EQ(load(tensors, config).layers.size(), 2U);
}

TEST(Weights, NamesEveryMissingTensor) {
  ModelConfig config = small_config();
  config.qkv_bias = config.o_bias = config.mlp_bias = true;
  const Tensors whole = small_tensors(config);
  for (const auto& [name, tensor] : whole) {
    SCOPED_TRACE(name);
    Tensors tensors = whole;
    tensors.erase(name);
    expect_error(ErrorCode::kInvalidFile,
                 {"[weights] ", "model.safetensors: tensor '" + name + "', got nothing"},
                 [&] { (void)load(tensors, config); });
    tensors[name] = filled("F32", {3, 5}, 0.0F);
    expect_error(ErrorCode::kInvalidFile, {"tensor '" + name + "' shape, got [3, 5], accepted ["},
                 [&] { (void)load(tensors, config); });
    std::int64_t elements = 1;
    for (const auto size : tensor.shape) elements *= size;
    tensors[name] = {"I32", tensor.shape, std::string(static_cast<std::size_t>(4 * elements), '1')};
    expect_error(ErrorCode::kUnsupported, {"tensor '" + name + "' dtype, got 'I32'"},
                 [&] { (void)load(tensors, config); });
  }
}

TEST(Weights, RejectsTensorsWithoutAPlace) {
  const ModelConfig config = small_config();
  for (const char* name : {"model.layers.0.self_attn.q_norm.weight", "model.layers.2.mlp.x",
                           "model.layers.0.self_attn.q_proj.bias"}) {
    Tensors tensors = small_tensors(config);
    tensors[name] = filled("F32", {24}, 0.0F);
    expect_error(ErrorCode::kInvalidFile, {std::string("tensor '") + name + "', got one that"},
                 [&] { (void)load(tensors, config); });
  }
}

TEST(Weights, NamesNonFiniteWeights) {
  ModelConfig config = small_config();
  config.qkv_bias = true;
  const Tensors whole = small_tensors(config);
  ThreadPool pool(3);
  for (const auto& [name, tensor] : whole) {
    for (const char* dtype : {"F32", "F16", "BF16"}) {
      SCOPED_TRACE(name + ' ' + dtype);
      Tensors tensors = whole;
      Tensor& bad = tensors[name] = filled(dtype, tensor.shape, 0.25F);
      const std::size_t size = std::string(dtype) == "F32" ? 4 : 2;
      const std::size_t element = bad.bytes.size() / size - 1;
      const Tensor nan = filled(dtype, {1}, std::numeric_limits<float>::quiet_NaN());
      bad.bytes.replace(element * size, size, nan.bytes);
      const std::string place = "tensor '" + name + "' element " + std::to_string(element) +
                                " of " + std::to_string(element + 1) + ", got ";
      expect_error(ErrorCode::kInvalidFile, {place + "NaN, accepted finite numbers"},
                   [&] { (void)load(tensors, config); });
      const Tensor infinity = filled(dtype, {1}, -std::numeric_limits<float>::infinity());
      bad.bytes.replace(element * size, size, infinity.bytes);
      LoadOptions options;
      options.pool = &pool;
      expect_error(ErrorCode::kInvalidFile, {place + "-infinity"},
                   [&] { (void)load(tensors, config, options); });
      options.check_finite = false;
      EXPECT_NO_THROW((void)load(tensors, config, options));
    }
  }
}

// Two bad values in one matrix of several scan chunks: the first is named for any number of
// threads.
TEST(Weights, NamesTheFirstBadElement) {
  ModelConfig config = small_config();
  config.vocab_size = 400000;
  Tensors tensors = small_tensors(config);
  tensors["lm_head.weight"] = filled("F32", {400000, 8}, 0.25F);
  Tensor& embed = tensors["model.embed_tokens.weight"] = filled("F32", {400000, 8}, 0.25F);
  const std::string infinity = filled("F32", {1}, std::numeric_limits<float>::infinity()).bytes;
  embed.bytes.replace(4 * 3000000, 4, infinity);
  embed.bytes.replace(4 * 1500001, 4, infinity);
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    LoadOptions options;
    options.pool = &pool;
    expect_error(ErrorCode::kInvalidFile, {"embed_tokens.weight' element 1500001 of 3200000"},
                 [&] { (void)load(tensors, config, options); });
  }
}

// Every bit pattern of 16 bits, and the corner patterns of 32, against the C library's view.
TEST(FiniteScan, AgreesWithIsfinite) {
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const auto* data = reinterpret_cast<const std::byte*>(&half);
    ASSERT_EQ(has_non_finite(WeightType::kF16, data, 2), !std::isfinite(f16_to_f32(half))) << bits;
    ASSERT_EQ(has_non_finite(WeightType::kBf16, data, 2), !std::isfinite(bf16_to_f32(half)))
        << bits;
    for (const std::uint32_t low : {0U, 1U, 0x8000U, 0xffffU}) {
      const std::uint32_t word = (bits << 16) | low;
      float value = 0.0F;
      std::memcpy(&value, &word, 4);
      ASSERT_EQ(has_non_finite(WeightType::kF32, reinterpret_cast<const std::byte*>(&word), 4),
                !std::isfinite(value))
          << word;
    }
  }
}

// One bad element at every place of buffers of every small length and alignment.
TEST(FiniteScan, FindsEveryPlace) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    const int size = dtype_bytes(dtype);
    for (int count : {0, 1, 2, 3, 4, 5, 17, 64, 33000}) {
      for (int shift = 0; shift < (count < 100 ? 9 : 2); ++shift) {
        // All bits set but the lowest exponent bit: the largest finite value of either sign.
        std::vector<std::byte> buffer(static_cast<std::size_t>(shift + count * size));
        std::byte* data = buffer.data() + shift;
        for (int i = 0; i < count; ++i) {
          std::uint32_t bits = dtype == DType::kF32 ? 0xff7fffffU : 0U;
          if (dtype == DType::kF16) bits = 0xfbffU;
          if (dtype == DType::kBf16) bits = 0xff7fU;
          std::memcpy(data + i * size, &bits, static_cast<std::size_t>(size));
        }
        const std::int64_t bytes = std::int64_t{count} * size;
        ASSERT_FALSE(has_non_finite(weight_type(dtype), data, bytes));
        ASSERT_EQ(find_non_finite(weight_type(dtype), data, bytes), -1);
        for (int i = 0; i < count; i += count < 100 ? 1 : 3299) {
          std::vector<std::byte> bad = buffer;
          std::uint32_t bits = dtype == DType::kF32 ? 0x7f800000U : 0U;
          if (dtype == DType::kF16) bits = 0x7c00U;
          if (dtype == DType::kBf16) bits = 0x7f80U;
          std::memcpy(bad.data() + shift + i * size, &bits, static_cast<std::size_t>(size));
          ASSERT_TRUE(has_non_finite(weight_type(dtype), bad.data() + shift, bytes))
              << count << ' ' << i;
          ASSERT_EQ(find_non_finite(weight_type(dtype), bad.data() + shift, bytes), i);
        }
      }
    }
  }
}

TEST(Weights, LoadsTheBundledModel) {
  const std::string dir = kSource + "/models/vesper-19m";
  ThreadPool pool(2);
  LoadOptions options;
  options.pool = &pool;
  const ModelWeights w = load_weights(dir, load_config(dir), options);
  ASSERT_EQ(w.layers.size(), 8U);
  EXPECT_EQ(w.bytes, 37761792);  // metadata.total_size of its index
  EXPECT_EQ(w.parameters, 18880896);
  EXPECT_EQ(w.layers[7].q_proj.shape, (std::vector<std::int64_t>{1024, 384}));
  EXPECT_EQ(w.embed.type, WeightType::kBf16);
  EXPECT_EQ(w.lm_head.data, w.embed.data);
  const ModelWeights copy = w;
  EXPECT_EQ(copy.layers[0].q_proj.data, w.layers[0].q_proj.data);
}

TEST(Weights, LoadsTheTinyModels) {
  struct Case {
    const char* name;
    DType dtype;
    RopeScaling rope;
    int group;
    bool bias;
    bool tied;
  };
  const std::vector<Case> cases = {
      {"llama-2-7b-chat", DType::kF16, RopeScaling::kDefault, 1, false, false},
      {"llama-3.1-8b-instruct", DType::kBf16, RopeScaling::kLlama3, 4, false, false},
      {"longchat-7b-v1.5-32k", DType::kF16, RopeScaling::kLinear, 1, false, false},
      {"qwen2.5-instruct", DType::kBf16, RopeScaling::kDefault, 2, true, true},
      {"qwen3", DType::kBf16, RopeScaling::kDefault, 2, false, true},
      {"mistral-7b-v0.1", DType::kBf16, RopeScaling::kDefault, 2, false, false}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    const std::string dir = kSource + "/tests/golden/tiny/" + c.name;
    const ModelConfig config = load_config(dir);
    const ModelWeights w = load_weights(dir, config);
    EXPECT_EQ(config.rope.scaling, c.rope);
    EXPECT_EQ(config.group_size(), c.group);
    EXPECT_EQ(static_cast<bool>(w.layers[0].q_bias), c.bias);
    EXPECT_EQ(w.lm_head.data == w.embed.data, c.tied);
    EXPECT_EQ(w.layers[1].up_proj.type, weight_type(c.dtype));
    EXPECT_EQ(static_cast<bool>(w.layers[1].q_norm), config.qk_norm);
    EXPECT_EQ(static_cast<bool>(w.layers[1].k_norm), config.qk_norm);
    EXPECT_EQ(w.bytes, 2 * w.parameters);
  }
}

TEST(ExpandQuantised, TensorsBecomeHalves) {
  // Two rows of one Q8_0 block each: an f16 scale and 32 signed bytes.
  std::vector<std::byte> blocks(2 * 34);
  for (std::size_t row = 0; row < 2; ++row) {
    const std::uint16_t scale = f32_to_f16(row == 0 ? 0.25F : 0.01F);
    std::memcpy(blocks.data() + row * 34, &scale, 2);
    for (std::size_t i = 0; i < 32; ++i) {
      blocks[row * 34 + 2 + i] = static_cast<std::byte>(static_cast<std::int8_t>(7 * i - 100));
    }
  }
  const TensorView tensor = {"embed", WeightType::kQ8_0, {2, 32}, blocks.data(), 68};
  ThreadPool pool(2);
  const Buffer out = expand_quantised(tensor, pool);
  EXPECT_EQ(out.size(), 128U);
  std::vector<float> exact(64);
  dequantise_row(WeightType::kQ8_0, blocks.data(), exact);
  for (std::size_t i = 0; i < exact.size(); ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, out.data() + 2 * i, 2);
    EXPECT_NEAR(f16_to_f32(bits), exact[i], std::abs(exact[i]) * 0x1p-11F);
  }
  const std::uint16_t huge = f32_to_f16(60000.0F);
  std::memcpy(blocks.data(), &huge, 2);
  expect_error(ErrorCode::kUnsupported, {"embed", "65504"},
               [&] { (void)expand_quantised(tensor, pool); });
}

}  // namespace
}  // namespace twilight
