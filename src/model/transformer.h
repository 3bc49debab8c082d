#ifndef TWILIGHT_MODEL_TRANSFORMER_H_
#define TWILIGHT_MODEL_TRANSFORMER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "core/device_memory.h"
#include "core/thread_pool.h"
#include "model/config.h"
#include "model/weights.h"
#include "ops/backend.h"

namespace twilight {

/// What a layer's attention does with its new tokens; the model does not know dense from sparse,
/// prefill from decode, or where keys live.
class AttentionPort {
 public:
  virtual ~AttentionPort();

  /// What appends the rotated keys and the values of the new tokens, [T, Hkv, D] with rows packed,
  /// in the backend's memory as all buffers are.
  virtual AppendKvParams append_params(std::int32_t layer, const float* k, const float* v) = 0;
  /// Once they are appended.
  virtual void seal(std::int32_t layer) = 0;
  /// Writes [T, Hq, D] for queries [T, Hq, D], rows packed.
  virtual void attend(std::int32_t layer, const float* q, float* out) = 0;
};

/// The Llama-family forward pass over const weights: everything but attention itself. Owns the
/// activations of up to `max_tokens` tokens and, where the backend's memory is not the host's, a
/// copy of the weights there (a quantised embedding table stays: its rows are looked up on the
/// host). Quantised weights stay in their blocks where the backend takes those and are f16
/// elsewhere. Allocates nothing after construction. Not thread-safe; several may share the weights.
class Transformer {
 public:
  /// `config` and `weights` must outlive it; `pool` is used during construction alone.
  /// `full_precision` asks the backend for f32 products.
  Transformer(Backend& backend, ThreadPool& pool, const ModelConfig& config,
              const ModelWeights& weights, std::int32_t max_tokens, bool full_precision);

  [[nodiscard]] std::int32_t max_tokens() const { return max_tokens_; }

  /// Throws Error(kInvalidArgument) for a token outside the vocabulary.
  void check_tokens(std::span<const std::int32_t> tokens) const;

  /// Runs T <= max_tokens tokens at their positions. Tokens outside the vocabulary throw
  /// Error(kInvalidArgument). Hidden states stay inside for `logits`.
  /// With `row_invariant` a row's results do not depend on the other rows (decode); without it
  /// large matrix products may be used (prefill).
  void forward(std::span<const std::int32_t> tokens, std::span<const std::int32_t> positions,
               AttentionPort& attention, bool row_invariant);

  /// The same in two: `prepare` takes the tokens in, `run_layers` only calls ops, so that a backend
  /// can record them.
  void prepare(std::span<const std::int32_t> tokens, std::span<const std::int32_t> positions,
               bool row_invariant);
  void run_layers(AttentionPort& attention);
  /// Ops alone that leave the logits [rows, vocab] of up to kLogitRows rows in the backend's
  /// memory, from where `read_logits` takes them. Only where that is not the host's.
  void run_logits(std::int32_t first_row, std::int32_t num_rows);
  void read_logits(std::int32_t first_row, std::int32_t num_rows, std::span<float> out);
  static constexpr std::int32_t kLogitRows = 64;
  /// The same for tokens chosen from the logits that run_logits left: the first of the largest, or
  /// one drawn as `set_draws` said, whose number of rows it is for. -1 for a row with NaN or
  /// without a finite maximum.
  void run_argmax(std::int32_t num_rows);
  void set_draws(std::span<const RowDraw> draws);
  void run_sample(std::int32_t num_rows);
  void read_tokens(std::span<std::int32_t> out);

  /// Logits [rows, vocab] of rows `first_row` .. of the last forward pass, to host memory.
  void logits(std::int32_t first_row, std::int32_t num_rows, std::span<float> out);

 private:
  /// A tensor in the backend's memory.
  struct Matrix {
    WeightView view;
    DeviceBuffer copy;  // empty where the backend reads the model's own
  };
  /// Norm weights or a bias in f32 in the backend's memory; null where the model has none.
  struct Vector {
    std::vector<float> host;
    DeviceBuffer copy;
    [[nodiscard]] const float* data() const {
      return copy.size() > 0 ? copy.as<float>() : host.empty() ? nullptr : host.data();
    }
  };
  [[nodiscard]] Matrix matrix(const TensorView& tensor, ThreadPool& pool);
  [[nodiscard]] Vector vector(const TensorView& tensor);
  [[nodiscard]] LinearParams linear(const float* x, const Matrix& weight, const Vector& bias,
                                    float* y, std::int32_t num_rows, bool accumulate = false) const;
  [[nodiscard]] RmsNormParams norm(const float* x, const Vector& weight, float* y,
                                   std::int64_t num_rows, std::int64_t size) const;
  void write_logits(std::int32_t first_row, std::int32_t num_rows, float* out);
  void embed(std::span<const std::int32_t> tokens);
  void set_rotation(std::span<const std::int32_t> positions);

  Backend& backend_;
  DeviceMemory& memory_;
  const ModelConfig& config_;
  const ModelWeights& weights_;
  std::int32_t max_tokens_;
  bool full_precision_;
  bool row_invariant_ = false;  // of the last forward pass
  std::int32_t num_rows_ = 0;
  std::vector<double> inverse_frequencies_;  // [D / 2]

  struct Layer {
    Matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
    Vector input_norm, post_norm, q_norm, k_norm;
    Vector q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
  };
  std::vector<Layer> layers_;
  Vector final_norm_;
  Matrix lm_head_;
  Matrix embed_;              // its data is null where rows are looked up on the host
  DeviceBuffer frequencies_;  // inverse_frequencies_; this and the numbers below empty on the host

  DeviceBuffer activations_;
  Buffer staging_;                     // rows looked up on the host on their way to a device
  float* input_hidden_ = nullptr;      // hidden_ itself on the host, else staged
  float* logits_ = nullptr;            // [kLogitRows, vocab]
  RowDraw* draws_ = nullptr;           // [kLogitRows]
  std::int32_t* chosen_ = nullptr;     // [kLogitRows]
  std::int32_t* tokens_ = nullptr;     // [T]
  std::int32_t* positions_ = nullptr;  // [T]
  float* hidden_ = nullptr;            // [T, hidden]
  float* normed_ = nullptr;            // [T, hidden]
  float* q_ = nullptr;                 // [T, Hq * D]
  float* k_ = nullptr;                 // [T, Hkv * D]
  float* v_ = nullptr;                 // [T, Hkv * D]
  float* mixed_ = nullptr;             // [T, Hq * D] attention output
  float* gate_ = nullptr;              // [T, intermediate]
  float* up_ = nullptr;                // [T, intermediate]
  float* cos_ = nullptr;               // [T, D / 2]
  float* sin_ = nullptr;               // [T, D / 2]
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TRANSFORMER_H_
