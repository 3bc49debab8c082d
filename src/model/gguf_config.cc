#include "model/gguf_config.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "core/check.h"
#include "model/gguf_scalar.h"
#include "model/json_reader.h"

namespace twilight {
namespace {

struct ArchitectureKey {
  std::string_view name;
  Architecture architecture;
};
constexpr std::array<ArchitectureKey, 3> kArchitectures = {{
    {"llama", Architecture::kLlama},
    {"qwen2", Architecture::kQwen2},
    {"qwen3", Architecture::kQwen3},
}};

// Control tokens that end a turn in the chat formats of these families, for files that name only
// one end token.
constexpr std::array<std::string_view, 6> kTurnEnds = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>"};
constexpr std::int32_t kControl = 3;

// Keys that change the forward pass where they hold another value than the one that means nothing.
struct NeutralKey {
  std::string_view suffix;
  double neutral;
};
constexpr std::array<NeutralKey, 9> kNeutralKeys = {{
    {".expert_count", 0},
    {".attention.scale", 0},
    {".attention.clamp_kqv", 0},
    {".attn_logit_softcapping", 0},
    {".final_logit_softcapping", 0},
    {".logit_scale", 1},
    {".residual_scale", 1},
    {".embedding_scale", 1},
    {".rope.scaling.attn_factor", 1},
}};

class ConfigReader {
 public:
  explicit ConfigReader(const GgufFile& file) : file_(file) {}

  ModelConfig read() {
    const auto name = file_.string("general.architecture");
    const ArchitectureKey* known = nullptr;
    for (const auto& key : kArchitectures) {
      if (name && key.name == *name) known = &key;
    }
    if (known == nullptr) file_.unsupported("general.architecture", "llama, qwen2 or qwen3");
    prefix_ = *name;
    config_.architecture = known->architecture;
    if (file_.integer_or("split.count", 0, 65535, 1) > 1) {
      file_.unsupported("split.count", "1 (join the parts with llama-gguf-split --merge)");
    }
    read_sizes();
    read_parts();
    read_rope();
    read_tokens();
    check_supported();
    return config_;
  }

 private:
  [[nodiscard]] std::string key(std::string_view suffix) const { return cat(prefix_, suffix); }

  int size(std::string_view suffix, std::int64_t high) const {
    return static_cast<int>(file_.integer(key(suffix), 1, high));
  }

  const GgufTensor* find_tensor(std::string_view name) const {
    for (const GgufTensor& tensor : file_.tensors()) {
      if (tensor.name == name) return &tensor;
    }
    return nullptr;
  }

  void read_sizes() {
    config_.hidden_size = size(".embedding_length", config_limits::kMaxHidden);
    config_.intermediate_size = size(".feed_forward_length", config_limits::kMaxIntermediate);
    config_.num_layers = size(".block_count", config_limits::kMaxLayers);
    config_.num_heads = size(".attention.head_count", config_limits::kMaxHeads);
    config_.num_kv_heads = static_cast<int>(file_.integer_or(
        key(".attention.head_count_kv"), 1, config_limits::kMaxHeads, config_.num_heads));
    if (config_.num_heads % config_.num_kv_heads != 0) {
      file_.reject(key(".attention.head_count_kv"),
                   cat("a divisor of attention.head_count, ", config_.num_heads));
    }
    config_.max_positions = size(".context_length", config_limits::kMaxPositions);
    config_.rms_norm_eps = file_.number(key(".attention.layer_norm_rms_epsilon"), 1e-20, 1.0);
    read_head_dim();
    const GgufTensor* embed = find_tensor("token_embd.weight");
    if (embed == nullptr || embed->shape.size() != 2 ||
        embed->shape[0] > config_limits::kMaxVocab) {
      fail(ErrorCode::kInvalidFile, kGgufWhere, file_.path(), ": tensor 'token_embd.weight', got ",
           embed == nullptr ? "nothing" : "another shape", ", accepted at most ",
           config_limits::kMaxVocab, " rows of ", config_.hidden_size);
    }
    config_.vocab_size = static_cast<int>(embed->shape[0]);
  }

  void read_head_dim() {
    const std::string accepted = cat("an even integer from 2 to ", config_limits::kMaxHeadDim);
    const std::string length = key(".attention.key_length");
    std::int64_t head_dim = config_.hidden_size / config_.num_heads;
    if (file_.has(length)) {
      head_dim = file_.integer(length, 2, config_limits::kMaxHeadDim);
    } else if (config_.hidden_size % config_.num_heads != 0) {
      file_.reject(key(".embedding_length"), cat("a multiple of attention.head_count, ",
                                                 config_.num_heads, ", where no key_length is"));
    }
    if (head_dim % 2 != 0 || head_dim < 2 || head_dim > config_limits::kMaxHeadDim) {
      file_.reject(length, cat(accepted, "; the head dimension is ", head_dim));
    }
    for (const char* other : {".attention.value_length", ".rope.dimension_count"}) {
      if (file_.integer_or(key(other), 0, 1 << 30, head_dim) != head_dim) {
        file_.unsupported(key(other), cat("the head dimension, ", head_dim));
      }
    }
    config_.head_dim = static_cast<int>(head_dim);
  }

  void read_parts() {
    config_.tie_word_embeddings = find_tensor("output.weight") == nullptr;
    config_.qkv_bias = find_tensor("blk.0.attn_q.bias") != nullptr;
    config_.o_bias = find_tensor("blk.0.attn_output.bias") != nullptr;
    config_.mlp_bias = find_tensor("blk.0.ffn_gate.bias") != nullptr;
    config_.qk_norm = config_.architecture == Architecture::kQwen3;
  }

  void read_rope() {
    RopeConfig& rope = config_.rope;
    rope.theta = file_.number_or(key(".rope.freq_base"), 1.0 + 1e-9, 1e12, rope.theta);
    const std::string type_key = key(".rope.scaling.type");
    const std::string_view type = file_.string(type_key).value_or("none");
    double factor = file_.number_or(key(".rope.scale_linear"), 0.0, 1e4, 1.0);
    if (type == "linear") {
      factor = file_.number(key(".rope.scaling.factor"), 1.0, 1e4);
    } else if (type != "none") {
      file_.unsupported(type_key, "none or linear");
    }
    if (factor > 1.0) {
      rope.scaling = RopeScaling::kLinear;
      rope.factor = factor;
    }
    read_divisors();
    const std::string window = key(".attention.sliding_window");
    const std::int64_t tokens = file_.integer_or(window, 0, std::int64_t{1} << 40, 0);
    if (tokens > 0 && tokens < max_context_length(config_)) config_.sliding_window = tokens;
  }

  void read_divisors() {
    const GgufTensor* tensor = find_tensor("rope_freqs.weight");
    if (tensor == nullptr) return;
    const std::string what = cat(file_.path(), ": tensor 'rope_freqs.weight'");
    if (tensor->type != WeightType::kF32 ||
        tensor->shape != std::vector<std::int64_t>{config_.head_dim / 2}) {
      fail(ErrorCode::kInvalidFile, kGgufWhere, what, ", got another type or shape, accepted F32 [",
           config_.head_dim / 2, "]");
    }
    if (config_.rope.scaling != RopeScaling::kDefault) {
      fail(ErrorCode::kUnsupported, kGgufWhere, what, ", got one beside linear scaling",
           ", accepted one of the two");
    }
    config_.rope.scaling = RopeScaling::kLlama3;
    for (int i = 0; i < config_.head_dim / 2; ++i) {
      const auto bits = load_little(
          file_.bytes().subspan(static_cast<std::size_t>(tensor->begin + 4 * std::int64_t{i}), 4));
      const float divisor = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
      if (!std::isfinite(divisor) || divisor < 1e-3F || divisor > 1e4F) {
        fail(ErrorCode::kInvalidFile, kGgufWhere, what, " element ", i, ", got ", divisor,
             ", accepted a number from 0.001 to 10000");
      }
      config_.rope.divisors.push_back(divisor);
    }
  }

  std::optional<int> token_id(const char* name) const {
    if (!file_.has(name)) return std::nullopt;
    // All ones stands for "none".
    const std::int64_t id = file_.integer(name, -1, 0xFFFFFFFF);
    if (id == -1 || id == 0xFFFFFFFF) return std::nullopt;
    return static_cast<int>(file_.integer(name, 0, config_.vocab_size - 1));
  }

  void add_end(std::optional<int> id) {
    auto& ids = config_.eos_token_ids;
    if (id && std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(*id);
  }

  void read_tokens() {
    config_.bos_token_id = token_id("tokenizer.ggml.bos_token_id");
    add_end(token_id("tokenizer.ggml.eos_token_id"));
    add_end(token_id("tokenizer.ggml.eot_token_id"));
    add_end(token_id("tokenizer.ggml.eom_token_id"));
    const auto tokens = file_.strings("tokenizer.ggml.tokens");
    const auto types = file_.integers("tokenizer.ggml.token_type", 0, 6);
    const std::size_t count =
        std::min({tokens.size(), types.size(), static_cast<std::size_t>(config_.vocab_size)});
    for (std::size_t i = 0; i < count; ++i) {
      if (types[i] != kControl) continue;
      if (std::find(kTurnEnds.begin(), kTurnEnds.end(), tokens[i]) != kTurnEnds.end()) {
        add_end(static_cast<int>(i));
      }
    }
  }

  void check_supported() const {
    for (const NeutralKey& entry : kNeutralKeys) {
      const std::string name = key(entry.suffix);
      if (file_.number_or(name, -1e30, 1e30, entry.neutral) != entry.neutral) {
        file_.unsupported(name, cat(entry.neutral, " or nothing"));
      }
    }
    if (!file_.boolean_or(key(".attention.causal"), true)) {
      file_.unsupported(key(".attention.causal"), "true");
    }
  }

  const GgufFile& file_;
  std::string prefix_;
  ModelConfig config_;
};

}  // namespace

ModelConfig gguf_config(const GgufFile& file) { return ConfigReader(file).read(); }

}  // namespace twilight
