// Logits and greedy tokens against Hugging Face transformers in float32
// (scripts/golden/make_logits_goldens.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/mapped_file.h"
#include "twilight/engine.h"

namespace twilight {
namespace {

const std::string kRoot = TWILIGHT_SOURCE_DIR;

struct GoldenCase {
  std::string name;
  std::vector<std::int32_t> tokens, positions, greedy;
  std::vector<double> greedy_margin;
  std::vector<std::vector<float>> logits;
  double noise = 0;
};

struct Golden {
  std::string model;
  std::vector<GoldenCase> cases;
};

Golden read_golden(const std::string& name) {
  const std::string folder = kRoot + "/tests/golden/logits/";
  const auto json = nlohmann::json::parse(read_text_file(folder + name + ".json"));
  const std::string rows = read_text_file(folder + json["logits_file"].get<std::string>());
  const auto vocab = json["vocab_size"].get<std::size_t>();
  Golden golden;
  golden.model = kRoot + "/" + json["model"].get<std::string>();
  for (const auto& entry : json["cases"]) {
    GoldenCase c;
    c.name = entry["name"];
    entry["tokens"].get_to(c.tokens);
    entry["positions"].get_to(c.positions);
    entry["greedy"].get_to(c.greedy);
    entry["greedy_margin"].get_to(c.greedy_margin);
    c.noise = entry["noise"];
    const auto first = entry["first_row"].get<std::size_t>();
    for (std::size_t i = 0; i < c.positions.size(); ++i) {
      std::vector<float> row(vocab);
      std::memcpy(row.data(), rows.data() + (first + i) * vocab * sizeof(float),
                  vocab * sizeof(float));
      c.logits.push_back(std::move(row));
    }
    golden.cases.push_back(std::move(c));
  }
  return golden;
}

double max_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double out = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= out)) out = difference;  // NaN too
  }
  return out;
}

enum class Feed { kPrefill, kDecode };

struct Variant {
  std::string isa = "auto";
  std::string device = "cpu";
  bool exact = true;  // f32 products and an f32 cache
  Feed feed = Feed::kPrefill;
  std::int32_t chunk = 512;
};

// Two f32 implementations of the reference differ by `noise` (stored with the goldens); ours sums
// in other orders again, and over D, hidden and N terms, so 64 times that is allowed. In bf16 both
// operands of the 9 products of a layer (7 matrices, 2 of attention) round to a relative 2^-9:
// independent errors add as a square root, and the largest of V normal ones is sqrt(2 ln V) of
// them.
double tolerance(const GoldenCase& c, const Variant& variant, int num_layers,
                 const std::vector<float>& logits) {
  if (variant.exact) return 64 * c.noise;
  double squares = 0;
  for (const float logit : logits)
    squares += static_cast<double>(logit) * static_cast<double>(logit);
  const auto vocab = static_cast<double>(logits.size());
  return std::ldexp(std::sqrt(2 * std::log(vocab) * 2 * 9 * num_layers * squares / vocab), -9);
}

void check(const std::string& name, const Variant& variant, std::size_t max_tokens) {
  const Golden golden = read_golden(name);
  DeviceOptions device;
  device.isa = variant.isa;
  device.device = variant.device;
  device.threads = 2;
  const Model model = Model::load(golden.model);
  for (const GoldenCase& c : golden.cases) {
    if (c.tokens.size() > max_tokens) continue;
    SCOPED_TRACE(name + " " + c.name + " " + variant.device + " " + variant.isa);
    EngineOptions options;
    options.policy = make_policy("dense");
    options.full_precision = variant.exact;
    options.cache_dtype = variant.exact ? DType::kF32 : DType::kBf16;
    options.prefill_chunk = variant.chunk;
    options.max_context = std::min(model.info().max_context,
                                   static_cast<std::int32_t>(c.tokens.size() + c.greedy.size()));
    Engine engine(Device(device), model, options);
    Sequence sequence = engine.cache().new_sequence();
    Sequence* const batch[] = {&sequence};
    std::vector<float> logits(static_cast<std::size_t>(model.info().vocab_size));
    for (std::size_t i = 0; i < c.positions.size(); ++i) {
      const auto from = static_cast<std::size_t>(sequence.num_tokens());
      const auto until = static_cast<std::size_t>(c.positions[i]) + 1;
      const auto part = std::span(c.tokens).subspan(from, until - from);
      if (variant.feed == Feed::kPrefill) {
        ASSERT_EQ(engine.prefill(sequence, part, logits), Engine::Status::kOk);
      } else {
        for (const std::int32_t token : part) {
          ASSERT_EQ(engine.decode(batch, {&token, 1}, logits), Engine::Status::kOk);
        }
      }
      EXPECT_LE(max_difference(logits, c.logits[i]),
                tolerance(c, variant, model.info().num_layers, c.logits[i]))
          << "position " << c.positions[i];
    }
    if (static_cast<std::size_t>(sequence.num_tokens()) != c.tokens.size()) continue;
    GenerateOptions generate_options;
    generate_options.max_tokens = static_cast<std::int32_t>(c.greedy.size());
    generate_options.stop_at_eos = false;
    const GenerateResult result = generate(engine, sequence, logits, generate_options);
    // A step whose two best logits are closer than the tolerance may go either way, and all after
    // it.
    const double margin = 2 * tolerance(c, variant, model.info().num_layers, c.logits.back());
    for (std::size_t i = 0; i < c.greedy.size(); ++i) {
      if (c.greedy_margin[i] < margin) break;
      ASSERT_LT(i, result.tokens.size());
      ASSERT_EQ(result.tokens[i], c.greedy[i]) << "greedy step " << i;
    }
  }
}

constexpr const char* kTiny[] = {
    "llama-2-7b-chat", "llama-3.1-8b-instruct", "longchat-7b-v1.5-32k", "qwen2.5-instruct",
    "qwen3",           "mistral-7b-v0.1"};

TEST(GoldenLogits, VesperInFullPrecision) { check("vesper-19m", {}, 1 << 20); }
TEST(GoldenLogits, VesperInBf16) { check("vesper-19m", {.exact = false}, 1 << 20); }
TEST(GoldenLogits, VesperThroughTheDecodePath) {
  check("vesper-19m", {.feed = Feed::kDecode}, 512);
  check("vesper-19m", {.exact = false, .feed = Feed::kDecode}, 512);
}

TEST(GoldenLogits, EveryArchitectureInFullPrecision) {
  for (const char* name : kTiny) check(name, {}, 1 << 20);
}
TEST(GoldenLogits, EveryArchitectureInOddChunks) {
  for (const char* name : kTiny) check(name, {.chunk = 7}, 1 << 20);
}
TEST(GoldenLogits, EveryArchitectureOnEveryPath) {
  for (const char* name : kTiny) {
    check(name, {.device = "ref"}, 1 << 20);
    check(name, {.isa = "scalar", .feed = Feed::kDecode}, 1 << 20);
    check(name, {.feed = Feed::kDecode}, 1 << 20);
    check(name, {.exact = false}, 1 << 20);
  }
}

}  // namespace
}  // namespace twilight
