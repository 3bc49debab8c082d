#ifndef TWILIGHT_MODEL_TRANSFORMER_H_
#define TWILIGHT_MODEL_TRANSFORMER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "model/config.h"
#include "model/weights.h"
#include "ops/backend.h"

namespace twilight {

/// What a layer's attention does with its new tokens; the model does not know dense from sparse,
/// prefill from decode, or where keys live.
class AttentionPort {
 public:
  virtual ~AttentionPort();

  /// Takes the rotated keys and the values of the new tokens in, [T, Hkv, D] with rows packed.
  virtual void append(std::int32_t layer, const float* k, const float* v) = 0;
  /// Writes [T, Hq, D] for queries [T, Hq, D], rows packed.
  virtual void attend(std::int32_t layer, const float* q, float* out) = 0;
};

/// The Llama-family forward pass over const weights: everything but attention itself. Owns the
/// activations of up to `max_tokens` tokens and allocates nothing after construction. Not
/// thread-safe; several may share the weights.
class Transformer {
 public:
  /// `config` and `weights` must outlive it. `full_precision` asks the backend for f32 products.
  Transformer(Backend& backend, const ModelConfig& config, const ModelWeights& weights,
              std::int32_t max_tokens, bool full_precision);

  [[nodiscard]] std::int32_t max_tokens() const { return max_tokens_; }

  /// Throws Error(kInvalidArgument) for a token outside the vocabulary.
  void check_tokens(std::span<const std::int32_t> tokens) const;

  /// Runs T <= max_tokens tokens at their positions. Tokens outside the vocabulary throw
  /// Error(kInvalidArgument). Hidden states stay inside for `logits`.
  /// With `row_invariant` a row's results do not depend on the other rows (decode); without it
  /// large matrix products may be used (prefill).
  void forward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> positions,
               AttentionPort& attention, bool row_invariant);

  /// Logits [rows, vocab] of rows `first_row` .. of the last forward pass.
  void logits(std::int32_t first_row, std::int32_t num_rows, std::span<float> out);

 private:
  void linear(const float* x, const TensorView& weight, const std::vector<float>& bias, float* y,
              std::int32_t num_rows, bool accumulate = false);
  void embed(std::span<const std::int32_t> tokens);
  void set_rotation(std::span<const std::int32_t> positions);

  Backend& backend_;
  const ModelConfig& config_;
  const ModelWeights& weights_;
  std::int32_t max_tokens_;
  bool full_precision_;
  bool row_invariant_ = false;  // of the last forward pass
  std::int32_t num_rows_ = 0;
  std::vector<double> inverse_frequencies_;  // [D / 2]

  // Norm weights and biases in f32; a few kilobytes a layer.
  struct SmallWeights {
    std::vector<float> input_norm, post_norm, q_norm, k_norm;
    std::vector<float> q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
  };
  std::vector<SmallWeights> small_;
  std::vector<float> final_norm_;

  Buffer memory_;
  float* hidden_ = nullptr;  // [T, hidden]
  float* normed_ = nullptr;  // [T, hidden]
  float* q_ = nullptr;       // [T, Hq * D]
  float* k_ = nullptr;       // [T, Hkv * D]
  float* v_ = nullptr;       // [T, Hkv * D]
  float* mixed_ = nullptr;   // [T, Hq * D] attention output
  float* gate_ = nullptr;    // [T, intermediate]
  float* up_ = nullptr;      // [T, intermediate]
  float* cos_ = nullptr;     // [T, D / 2]
  float* sin_ = nullptr;     // [T, D / 2]
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TRANSFORMER_H_
