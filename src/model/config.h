#ifndef TWILIGHT_MODEL_CONFIG_H_
#define TWILIGHT_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/rope_config.h"

namespace twilight {

enum class Architecture { kLlama, kMistral, kQwen2, kQwen3 };

/// Generous multiples of the largest models published; they keep every product inside 64 bits.
namespace config_limits {
inline constexpr int kMaxHidden = 1 << 16;
inline constexpr int kMaxIntermediate = 1 << 20;
inline constexpr int kMaxLayers = 1 << 10;
inline constexpr int kMaxHeads = 1 << 10;
inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMaxVocab = 1 << 22;
inline constexpr int kMaxPositions = 1 << 24;
}  // namespace config_limits

/// "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM" or "Qwen3ForCausalLM".
[[nodiscard]] std::string_view architecture_name(Architecture architecture);

/// Shape and constants of a Llama-family decoder: RMSNorm, rotary attention with grouped KV heads,
/// gated SiLU feed-forward. Every value has been checked: sizes positive and bounded, so products
/// of any two fit in 64 bits, num_heads a multiple of num_kv_heads, head_dim even and at most 512.
struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;     ///< Hq
  int num_kv_heads = 0;  ///< Hkv
  int head_dim = 0;      ///< D; num_heads * head_dim may differ from hidden_size
  int vocab_size = 0;
  int max_positions = 0;  ///< `max_position_embeddings` as the file gives it, tokens
  /// A token attends to this many tokens, itself included, where the model has a sliding window.
  std::optional<std::int64_t> sliding_window;
  double rms_norm_eps = 0.0;
  bool tie_word_embeddings = false;  ///< lm_head is the embedding matrix
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  ///< RMSNorm of every query and key head before it is rotated
  std::optional<int> bos_token_id;
  bool add_bos = true;             ///< texts start with it, where there is one
  std::vector<int> eos_token_ids;  ///< may be empty
  RopeConfig rope;

  [[nodiscard]] int group_size() const { return num_heads / num_kv_heads; }  ///< G
  [[nodiscard]] int q_size() const { return num_heads * head_dim; }
  [[nodiscard]] int kv_size() const { return num_kv_heads * head_dim; }
};

/// Reads the text of a config.json; `path_for_messages` is only quoted in errors. Fields that do
/// not change the forward pass (torch_dtype, dropout, initialisers, ...) are ignored; a field that
/// would change it in a way not implemented is an error. A Mistral config without `sliding_window`
/// counts as one without a window. Throws Error(kInvalidFile), or Error(kUnsupported) for another
/// architecture, layers that differ in their window or a quantised checkpoint: `[config] path:
/// field, got VALUE, accepted SET`.
[[nodiscard]] ModelConfig parse_config(std::string_view json_text,
                                       const std::string& path_for_messages);

/// `parse_config` on `model_dir`/config.json. Throws Error(kNotFound) where it is absent.
[[nodiscard]] ModelConfig load_config(const std::string& model_dir);

/// Longest context that the rotary encoding was made for and that a sliding window hides nothing
/// of, tokens. Linear scaling counts `max_positions` before stretching, as in the LongChat
/// checkpoints (4096 with factor 8 is 32768); otherwise it is `max_positions`.
[[nodiscard]] std::int64_t max_context_length(const ModelConfig& config);

/// `rope_inverse_frequencies(config.rope, config.head_dim)`.
[[nodiscard]] std::vector<float> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_CONFIG_H_
