// The same weights as a GGUF file and as a Hugging Face folder give the same logits, bit for bit;
// so do quantised blocks and their weights in f32, in full precision; and the file that
// TWILIGHT_SMOLLM2_GGUF names agrees with llama.cpp (tests/golden/gguf).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/float16.h"
#include "core/mapped_file.h"
#include "core/thread_pool.h"
#include "engine/device_impl.h"
#include "model/config.h"
#include "model/gguf_checkpoint.h"
#include "model/safetensors.h"
#include "support/far_backend.h"
#include "support/gguf_writer.h"
#include "support/temp_dir.h"
#include "twilight/engine.h"

namespace twilight {
namespace {

using test::gguf_bytes;
using test::GgufWriter;
using test::TempDir;

const std::string kRoot = TWILIGHT_SOURCE_DIR;

// GGUF name of a Hugging Face one, from the other direction of the table.
std::string gguf_name(const std::string& name, int num_layers) {
  for (const char* plain : {"token_embd.weight", "output_norm.weight", "output.weight"}) {
    if (hugging_face_name(plain) == name) return plain;
  }
  for (int layer = 0; layer < num_layers; ++layer) {
    for (const char* part :
         {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm",
          "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}) {
      for (const char* kind : {".weight", ".bias"}) {
        std::string candidate = "blk." + std::to_string(layer) + '.' + part + kind;
        if (hugging_face_name(candidate) == name) return candidate;
      }
    }
  }
  throw std::runtime_error("no GGUF name for " + name);
}

// Rows of a head from halves to pairs side by side, as converters store them for "llama".
std::string interleave(const TensorView& tensor, int head_dim) {
  const auto rows = tensor.shape[0];
  const auto row_bytes = static_cast<std::size_t>(tensor.bytes / rows);
  std::string out;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t in_head = r % head_dim;
    const std::int64_t from = r - in_head + in_head % 2 * (head_dim / 2) + in_head / 2;
    out.append(
        reinterpret_cast<const char*>(tensor.data) + static_cast<std::size_t>(from) * row_bytes,
        row_bytes);
  }
  return out;
}

// How matrices are stored: as the folder has them, as Q8_0 blocks, or as the weights of those in
// f32.
enum class Matrices { kAsTheyAre, kBlocks, kWeightsOfBlocks };

// Rows of `tensor`, already in the file's order, as Q8_0 blocks or the weights of those.
std::string q8_0(const TensorView& tensor, const std::string& data, bool blocks) {
  std::vector<float> values(static_cast<std::size_t>(tensor.elements()));
  dequantise_row(tensor.type, reinterpret_cast<const std::byte*>(data.data()), values);
  std::string out;
  for (std::size_t i = 0; i < values.size(); i += 32) {
    float largest = 0;
    for (std::size_t j = i; j < i + 32; ++j) largest = std::max(largest, std::abs(values[j]));
    const std::uint16_t scale = f32_to_f16(largest / 127);
    const float step = f16_to_f32(scale);
    std::string block = gguf_bytes(scale);
    for (std::size_t j = i; j < i + 32; ++j) {
      const float code = step > 0 ? std::nearbyint(values[j] / step) : 0;
      block += gguf_bytes(static_cast<std::int8_t>(std::clamp(code, -127.0F, 127.0F)));
    }
    if (!blocks) {
      float weights[32];
      dequantise_row(WeightType::kQ8_0, reinterpret_cast<const std::byte*>(block.data()), weights);
      block.assign(reinterpret_cast<const char*>(weights), sizeof(weights));
    }
    out += block;
  }
  return out;
}

std::string to_gguf(const std::string& folder, const std::string& architecture,
                    Matrices matrices = Matrices::kAsTheyAre) {
  const ModelConfig config = load_config(folder);
  const Checkpoint checkpoint(folder);
  GgufWriter w;
  w.string("general.architecture", architecture);
  const auto u32 = [&](const std::string& suffix, std::int64_t value) {
    w.u32(architecture + suffix, static_cast<std::uint32_t>(value));
  };
  u32(".block_count", config.num_layers);
  u32(".embedding_length", config.hidden_size);
  u32(".feed_forward_length", config.intermediate_size);
  u32(".attention.head_count", config.num_heads);
  u32(".attention.head_count_kv", config.num_kv_heads);
  u32(".attention.key_length", config.head_dim);
  u32(".attention.value_length", config.head_dim);
  u32(".context_length", config.max_positions);
  w.f32(architecture + ".rope.freq_base", static_cast<float>(config.rope.theta));
  w.f32(architecture + ".attention.layer_norm_rms_epsilon",
        static_cast<float>(config.rms_norm_eps));
  if (config.rope.scaling == RopeScaling::kLinear) {
    w.string(architecture + ".rope.scaling.type", "linear");
    w.f32(architecture + ".rope.scaling.factor", static_cast<float>(config.rope.factor));
  }
  for (const std::string& name : checkpoint.names()) {
    const TensorView tensor = checkpoint.tensor(name);
    const bool turned = architecture == "llama" && (name.find("q_proj") != std::string::npos ||
                                                    name.find("k_proj") != std::string::npos);
    std::string data = turned ? interleave(tensor, config.head_dim)
                              : std::string(reinterpret_cast<const char*>(tensor.data),
                                            static_cast<std::size_t>(tensor.bytes));
    std::vector<std::uint64_t> sizes(tensor.shape.rbegin(), tensor.shape.rend());
    WeightType type = tensor.type;
    if (matrices != Matrices::kAsTheyAre && tensor.shape.size() == 2 && tensor.shape[1] % 32 == 0) {
      const bool blocks = matrices == Matrices::kBlocks;
      data = q8_0(tensor, data, blocks);
      type = blocks ? WeightType::kQ8_0 : WeightType::kF32;
    }
    w.tensor(gguf_name(name, config.num_layers), static_cast<std::uint32_t>(type), sizes, data);
  }
  if (config.rope.scaling == RopeScaling::kLlama3) {
    ModelConfig plain = config;
    plain.rope.scaling = RopeScaling::kDefault;
    const auto with = rope_inverse_frequencies(config);
    const auto bare = rope_inverse_frequencies(plain);
    std::string divisors;
    for (std::size_t i = 0; i < with.size(); ++i) divisors += gguf_bytes(bare[i] / with[i]);
    w.tensor("rope_freqs.weight", 0, {with.size()}, divisors);
  }
  return w.file();
}

// After a prefill of all tokens but the last, and a decode step of that.
std::vector<float> logits_of(const Model& model, std::span<const std::int32_t> tokens,
                             bool full_precision, const Device& device) {
  EngineOptions options;
  options.policy = make_policy("dense");
  options.full_precision = full_precision;
  options.cache_dtype = full_precision ? DType::kF32 : DType::kBf16;
  options.max_context = static_cast<std::int32_t>(tokens.size());
  Engine engine(device, model, options);
  Sequence sequence = engine.cache().new_sequence();
  std::vector<float> logits(static_cast<std::size_t>(model.info().vocab_size));
  EXPECT_EQ(engine.prefill(sequence, tokens.first(tokens.size() - 1), logits), Engine::Status::kOk);
  Sequence* const batch[] = {&sequence};
  EXPECT_EQ(engine.decode(batch, tokens.last(1), logits), Engine::Status::kOk);
  return logits;
}

std::vector<float> logits_of(const Model& model, std::span<const std::int32_t> tokens,
                             bool full_precision) {
  DeviceOptions device;
  device.threads = 2;
  return logits_of(model, tokens, full_precision, Device(device));
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double out = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= out)) out = difference;
  }
  return out;
}

TEST(GgufLogits, EqualThoseOfTheFolder) {
  struct Case {
    const char* folder;
    const char* architecture;
    double tolerance;  // llama3: the divisors round once more than the formula
  };
  for (const Case& c :
       {Case{"tests/golden/tiny/llama-2-7b-chat", "llama", 0},
        Case{"tests/golden/tiny/longchat-7b-v1.5-32k", "llama", 0},
        Case{"tests/golden/tiny/llama-3.1-8b-instruct", "llama", 1e-4},
        Case{"tests/golden/tiny/qwen2.5-instruct", "qwen2", 0},
        Case{"tests/golden/tiny/qwen3", "qwen3", 0}, Case{"models/vesper-19m", "llama", 0}}) {
    SCOPED_TRACE(c.folder);
    const std::string folder = kRoot + '/' + c.folder;
    const TempDir dir;
    (void)dir.write("only.gguf", to_gguf(folder, c.architecture));
    const Model a = Model::load(folder);
    const Model b = Model::load(dir.path());  // the only *.gguf of a folder
    EXPECT_EQ(b.info().format, "gguf v3");
    EXPECT_EQ(a.info().format, "safetensors");
    EXPECT_EQ(a.info().architecture, b.info().architecture);
    EXPECT_EQ(a.info().weight_dtype, b.info().weight_dtype);
    EXPECT_EQ(a.info().parameters, b.info().parameters);
    std::vector<std::int32_t> tokens;
    tokens.reserve(50);
    for (int i = 0; i < 50; ++i) tokens.push_back((i * 37 + 11) % a.info().vocab_size);
    EXPECT_LE(largest_difference(logits_of(a, tokens, true), logits_of(b, tokens, true)),
              c.tolerance);
  }
}

// Tied and untied heads, embeddings in blocks, prefill and decode.
TEST(GgufLogits, BlocksCountAsTheirWeights) {
  struct Case {
    const char* folder;
    const char* architecture;
  };
  for (const Case& c :
       {Case{"tests/golden/tiny/qwen2.5-instruct", "qwen2"},
        Case{"tests/golden/tiny/llama-2-7b-chat", "llama"}, Case{"models/vesper-19m", "llama"}}) {
    SCOPED_TRACE(c.folder);
    const std::string folder = kRoot + '/' + c.folder;
    const TempDir dir;
    const auto load = [&](const char* name, Matrices matrices) {
      return Model::load(dir.write(name, to_gguf(folder, c.architecture, matrices)));
    };
    const Model blocks = load("blocks.gguf", Matrices::kBlocks);
    const Model weights = load("weights.gguf", Matrices::kWeightsOfBlocks);
    EXPECT_EQ(blocks.info().weight_dtype, "Q8_0");
    ASSERT_FALSE(blocks.info().weight_types.empty());
    EXPECT_EQ(blocks.info().weight_types.front().name, "Q8_0");
    EXPECT_TRUE(blocks.info().weight_types.front().blocks);
    std::int64_t parameters = 0, bytes = 0;
    for (const WeightTypeShare& type : blocks.info().weight_types) {
      parameters += type.parameters;
      bytes += type.bytes;
    }
    EXPECT_EQ(parameters, blocks.info().parameters);
    EXPECT_EQ(bytes, blocks.info().weight_bytes);
    for (const int count : {12, 50}) {
      std::vector<std::int32_t> tokens;
      tokens.reserve(static_cast<std::size_t>(count));
      for (int i = 0; i < count; ++i) {
        tokens.push_back((i * 37 + 11) % blocks.info().vocab_size);
      }
      const std::vector<float> expected = logits_of(weights, tokens, true);
      EXPECT_EQ(largest_difference(expected, logits_of(blocks, tokens, true)), 0);
      double square = 0;
      for (const float value : expected) square += static_cast<double>(value * value);
      const double size = std::sqrt(square / static_cast<double>(expected.size()));
      // Activations in bytes and bf16: a few hundredths at the worst of the vocabulary.
      EXPECT_LE(largest_difference(expected, logits_of(blocks, tokens, false)), .1 * size);
      // A device that takes no blocks has them as f16, far from the host.
      ThreadPool pool(2);
      auto far = std::make_unique<test::FarBackend>(make_cpu_backend(pool, "auto"),
                                                    IndexLayout::kTokenLanes);
      far->refuse_blocks();
      const Device device(std::make_shared<Device::Impl>(std::move(far), 2));
      EXPECT_FALSE(device.takes_weight_blocks());
      const double halves = largest_difference(expected, logits_of(blocks, tokens, true, device));
      EXPECT_LE(halves, .02 * size);
      EXPECT_GT(halves, 0);
    }
  }
}

TEST(GgufLogits, SmolLm2AgreesWithLlamaCpp) {
  const char* file = std::getenv("TWILIGHT_SMOLLM2_GGUF");
  if (file == nullptr) GTEST_SKIP() << "TWILIGHT_SMOLLM2_GGUF names no file";
  const auto golden =
      nlohmann::json::parse(read_text_file(kRoot + "/tests/golden/gguf/smollm2.json"));
  const Model model = Model::load(file);
  for (const auto& entry : golden["texts"]) {
    const auto& hex = entry["hex"].get_ref<const std::string&>();
    std::string text;
    for (std::size_t i = 0; i < hex.size(); i += 2) {
      text += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    }
    EXPECT_EQ(model.encode(text), entry["tokens"].get<std::vector<std::int32_t>>()) << hex;
  }
  for (const auto& entry : golden["logits"]) {
    const auto tokens = entry["tokens"].get<std::vector<std::int32_t>>();
    const auto ids = entry["top"].get<std::vector<std::size_t>>();
    const auto values = entry["values"].get<std::vector<double>>();
    const auto logits = logits_of(model, tokens, false);
    double square = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const double difference = static_cast<double>(logits[ids[i]]) - values[i];
      square += difference * difference;
    }
    // llama.cpp rounds activations to bytes before every product; here they are bf16 in a prefill
    // of more than 16 tokens, else bytes with roundings of their own.
    EXPECT_LE(std::sqrt(square / static_cast<double>(ids.size())),
              golden["tolerance"].get<double>());
    EXPECT_EQ(std::max_element(logits.begin(), logits.end()) - logits.begin(),
              static_cast<std::ptrdiff_t>(ids[0]));
  }
}

}  // namespace
}  // namespace twilight
