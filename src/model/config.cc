#include "model/config.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/mapped_file.h"

namespace twilight {
namespace {

constexpr std::string_view kWhere = "config";
constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;

using namespace config_limits;
constexpr int kQwen3HeadDim = 128;  // what the architecture means where the file is silent
constexpr int kMaxVocab = 1 << 22;
constexpr int kMaxPositions = 1 << 24;

struct ArchitectureNames {
  Architecture architecture;
  std::string_view class_name;
  std::string_view model_type;
};

constexpr std::array<ArchitectureNames, 4> kArchitectures = {{
    {Architecture::kLlama, "LlamaForCausalLM", "llama"},
    {Architecture::kMistral, "MistralForCausalLM", "mistral"},
    {Architecture::kQwen2, "Qwen2ForCausalLM", "qwen2"},
    {Architecture::kQwen3, "Qwen3ForCausalLM", "qwen3"},
}};

// For values that are well formed but need another forward pass.
[[noreturn]] void unsupported(const JsonReader& json, const char* field,
                              std::string_view accepted) {
  json.reject(field, accepted, ErrorCode::kUnsupported);
}

// The first entry of `architectures`, else `model_type`; where both are given they must agree.
Architecture read_architecture(const JsonReader& json) {
  constexpr std::string_view kAcceptedTypes = "llama, mistral, qwen2 or qwen3";
  const auto type = json.string("model_type");
  const ArchitectureNames* by_type = nullptr;
  if (type) {
    for (const auto& names : kArchitectures) {
      if (names.model_type == *type) by_type = &names;
    }
    if (by_type == nullptr) {
      unsupported(json, "model_type", kAcceptedTypes);
    }
  }
  const nlohmann::json* list = json.find("architectures");
  if (list == nullptr) {
    if (by_type == nullptr) json.reject("model_type", kAcceptedTypes);
    return by_type->architecture;
  }
  constexpr std::string_view kAccepted =
      "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM";
  if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
    json.reject("architectures", cat("a list of one name: ", kAccepted));
  }
  const auto& name = list->front().get_ref<const std::string&>();
  for (const auto& names : kArchitectures) {
    if (names.class_name != name) continue;
    if (by_type != nullptr && by_type != &names) {
      json.reject("model_type", cat(quote_name(names.model_type), " beside ", names.class_name));
    }
    return names.architecture;
  }
  unsupported(json, "architectures", kAccepted);
}

int read_size(const JsonReader& json, const char* field, int high) {
  return static_cast<int>(json.integer(field, 1, high));
}

void read_sizes(const JsonReader& json, ModelConfig& config) {
  config.hidden_size = read_size(json, "hidden_size", kMaxHidden);
  config.intermediate_size = read_size(json, "intermediate_size", kMaxIntermediate);
  config.num_layers = read_size(json, "num_hidden_layers", kMaxLayers);
  config.num_heads = read_size(json, "num_attention_heads", kMaxHeads);
  config.num_kv_heads =
      static_cast<int>(json.integer_or("num_key_value_heads", 1, kMaxHeads, config.num_heads));
  if (config.num_heads % config.num_kv_heads != 0) {
    json.reject("num_key_value_heads", cat("a divisor of num_attention_heads, ", config.num_heads));
  }
  config.vocab_size = read_size(json, "vocab_size", kMaxVocab);
  config.max_positions = read_size(json, "max_position_embeddings", kMaxPositions);
  config.rms_norm_eps = json.number("rms_norm_eps", 1e-20, 1.0);

  const std::string accepted = cat("an even integer from 2 to ", kMaxHeadDim);
  if (json.has("head_dim")) {
    config.head_dim = static_cast<int>(json.integer("head_dim", 2, kMaxHeadDim));
    if (config.head_dim % 2 != 0) json.reject("head_dim", accepted);
    return;
  }
  if (config.architecture == Architecture::kQwen3) {
    config.head_dim = kQwen3HeadDim;
    return;
  }
  if (config.hidden_size % config.num_heads != 0) {
    json.reject("hidden_size", cat("a multiple of num_attention_heads, ", config.num_heads,
                                   ", where head_dim is absent"));
  }
  config.head_dim = config.hidden_size / config.num_heads;
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim) {
    json.reject("head_dim",
                cat(accepted, "; hidden_size / num_attention_heads is ", config.head_dim));
  }
}

void read_biases(const JsonReader& json, ModelConfig& config) {
  const bool attention =
      json.boolean_or("attention_bias", config.architecture == Architecture::kQwen2);
  config.qkv_bias = attention;
  config.o_bias = attention && config.architecture != Architecture::kQwen2;
  config.mlp_bias = json.boolean_or("mlp_bias", false);
  config.qk_norm = config.architecture == Architecture::kQwen3;
}

void read_token_ids(const JsonReader& json, ModelConfig& config) {
  if (json.has("bos_token_id")) {
    config.bos_token_id = static_cast<int>(json.integer("bos_token_id", 0, config.vocab_size - 1));
  }
  for (const std::int64_t id : json.integers("eos_token_id", 0, config.vocab_size - 1)) {
    config.eos_token_ids.push_back(static_cast<int>(id));
  }
}

// A window no shorter than the context never hides a token. Qwen files carry one that only
// `use_sliding_window` turns on, and then for the layers from `max_window_layers` on; Llama has
// none.
void read_window(const JsonReader& json, ModelConfig& config) {
  const bool qwen =
      config.architecture == Architecture::kQwen2 || config.architecture == Architecture::kQwen3;
  const bool windowed =
      config.architecture == Architecture::kMistral || json.boolean_or("use_sliding_window", false);
  if (!windowed) return;
  if (!json.has("sliding_window")) {
    if (qwen) unsupported(json, "use_sliding_window", "false");
    return;
  }
  const auto window = json.integer("sliding_window", 1, std::int64_t{1} << 40);
  if (window < max_context_length(config)) config.sliding_window = window;
}

// Rejects what would need another forward pass.
void check_supported(const JsonReader& json) {
  if (const auto act = json.string("hidden_act"); act && *act != "silu") {
    unsupported(json, "hidden_act", "silu");
  }
  if (json.has("quantization_config")) {
    unsupported(json, "quantization_config", "null (F32, F16 or BF16 weights)");
  }
  if (const auto* types = json.find("layer_types"); types != nullptr) {
    if (!types->is_array()) json.reject("layer_types", "a list of full_attention");
    for (const auto& type : *types) {
      if (type != "full_attention") json.reject("layer_types", "a list of full_attention");
    }
  }
}

}  // namespace

std::string_view architecture_name(Architecture architecture) {
  for (const auto& names : kArchitectures) {
    if (names.architecture == architecture) return names.class_name;
  }
  fail(ErrorCode::kInternal, "architecture_name", "unknown value");
}

ModelConfig parse_config(std::string_view json_text, const std::string& path_for_messages) {
  const std::string& path = path_for_messages;
  if (json_text.size() > kMaxConfigBytes) {
    fail(ErrorCode::kInvalidFile, kWhere, path, ": size, got ", json_text.size(),
         " bytes, accepted at most ", kMaxConfigBytes);
  }
  const nlohmann::json document = parse_json(json_text, kWhere, path);
  const JsonReader json(document, kWhere, path);
  ModelConfig config;
  config.architecture = read_architecture(json);
  read_sizes(json, config);
  config.tie_word_embeddings = json.boolean_or("tie_word_embeddings", false);
  read_biases(json, config);
  read_token_ids(json, config);
  config.rope = parse_rope_config(json);
  read_window(json, config);
  check_supported(json);
  return config;
}

ModelConfig load_config(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  return parse_config(read_text_file(path), path);
}

std::int64_t max_context_length(const ModelConfig& config) {
  std::int64_t length = config.max_positions;
  if (config.rope.scaling == RopeScaling::kLinear) {
    length = static_cast<std::int64_t>(config.max_positions * config.rope.factor);
  }
  return std::min(length, config.sliding_window.value_or(length));
}

std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  return rope_inverse_frequencies(config.rope, config.head_dim);
}

}  // namespace twilight
