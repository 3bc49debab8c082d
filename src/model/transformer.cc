#include "model/transformer.h"

#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/float16.h"

namespace twilight {
namespace {

float element(const TensorView& tensor, std::int64_t i) {
  const std::byte* at = tensor.data + i * dtype_bytes(tensor.dtype);
  if (tensor.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return tensor.dtype == DType::kBf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

std::vector<float> to_f32(const TensorView& tensor) {
  if (tensor.data == nullptr) return {};
  std::vector<float> values(static_cast<std::size_t>(tensor.shape[0]));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = element(tensor, static_cast<std::int64_t>(i));
  }
  return values;
}

}  // namespace

AttentionPort::~AttentionPort() = default;

Transformer::Transformer(Backend& backend, const ModelConfig& config, const ModelWeights& weights,
                         std::int32_t max_tokens, bool full_precision)
    : backend_(backend),
      config_(config),
      weights_(weights),
      max_tokens_(max_tokens),
      full_precision_(full_precision) {
  require(max_tokens >= 1, "transformer", "max_tokens, got ", max_tokens, ", accepted 1 or more");
  for (const float frequency : rope_inverse_frequencies(config)) {
    inverse_frequencies_.push_back(static_cast<double>(frequency));
  }
  for (const LayerWeights& layer : weights.layers) {
    small_.push_back({to_f32(layer.input_norm), to_f32(layer.post_norm), to_f32(layer.q_norm),
                      to_f32(layer.k_norm), to_f32(layer.q_bias), to_f32(layer.k_bias),
                      to_f32(layer.v_bias), to_f32(layer.o_bias), to_f32(layer.gate_bias),
                      to_f32(layer.up_bias), to_f32(layer.down_bias)});
  }
  final_norm_ = to_f32(weights.final_norm);

  const auto carve = [&](Arena& arena) {
    const std::int64_t rows = max_tokens_;
    hidden_ = arena.take<float>("hidden", rows * config_.hidden_size);
    normed_ = arena.take<float>("normed", rows * config_.hidden_size);
    q_ = arena.take<float>("q", rows * config_.q_size());
    k_ = arena.take<float>("k", rows * config_.kv_size());
    v_ = arena.take<float>("v", rows * config_.kv_size());
    mixed_ = arena.take<float>("mixed", rows * config_.q_size());
    gate_ = arena.take<float>("gate", rows * config_.intermediate_size);
    up_ = arena.take<float>("up", rows * config_.intermediate_size);
    cos_ = arena.take<float>("cos", rows * (config_.head_dim / 2));
    sin_ = arena.take<float>("sin", rows * (config_.head_dim / 2));
  };
  Arena counter;
  carve(counter);
  memory_ = Buffer(counter.used_bytes());
  Arena arena(memory_.data(), memory_.size());
  carve(arena);
}

void Transformer::check_tokens(std::span<const std::int32_t> tokens) const {
  for (const std::int32_t token : tokens) {
    require(token >= 0 && token < config_.vocab_size, "forward", "token id, got ", token,
            ", accepted 0 to ", config_.vocab_size - 1);
  }
}

void Transformer::embed(std::span<const std::int32_t> tokens) {
  const std::int64_t hidden = config_.hidden_size;
  for (std::size_t row = 0; row < tokens.size(); ++row) {
    float* out = hidden_ + static_cast<std::int64_t>(row) * hidden;
    for (std::int64_t i = 0; i < hidden; ++i) {
      out[i] = element(weights_.embed, tokens[row] * hidden + i);
    }
  }
}

void Transformer::set_rotation(std::span<const std::int32_t> positions) {
  const std::size_t half = inverse_frequencies_.size();
  for (std::size_t row = 0; row < positions.size(); ++row) {
    for (std::size_t i = 0; i < half; ++i) {
      const double angle = positions[row] * inverse_frequencies_[i];
      cos_[row * half + i] = static_cast<float>(std::cos(angle));
      sin_[row * half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void Transformer::linear(const float* x, const TensorView& weight, const std::vector<float>& bias,
                         float* y, std::int32_t num_rows, bool accumulate) {
  LinearParams params;
  params.x = x;
  params.x_stride = weight.shape[1];
  params.num_rows = num_rows;
  params.weight = {weight.data, weight.dtype, weight.shape[0], weight.shape[1]};
  params.bias = bias.empty() ? nullptr : bias.data();
  params.y = y;
  params.y_stride = weight.shape[0];
  params.accumulate = accumulate;
  params.row_invariant = row_invariant_;
  params.full_precision = full_precision_;
  backend_.linear(params);
}

void Transformer::forward(std::span<const std::int32_t> tokens,
                          std::span<const std::int32_t> positions, AttentionPort& attention,
                          bool row_invariant) {
  require(tokens.size() == positions.size() && !tokens.empty() &&
              tokens.size() <= static_cast<std::size_t>(max_tokens_),
          "forward", "number of tokens, got ", tokens.size(), ", accepted 1 to ", max_tokens_);
  check_tokens(tokens);
  const auto rows = static_cast<std::int32_t>(tokens.size());
  row_invariant_ = row_invariant;
  embed(tokens);
  set_rotation(positions);
  const auto norm = [&](const std::vector<float>& weight) {
    backend_.rms_norm({hidden_, weight.data(), normed_, rows, config_.hidden_size,
                       static_cast<float>(config_.rms_norm_eps)});
  };
  const auto norm_heads = [&](float* x, const std::vector<float>& weight, int heads) {
    if (weight.empty()) return;
    backend_.rms_norm({x, weight.data(), x, rows * heads, config_.head_dim,
                       static_cast<float>(config_.rms_norm_eps)});
  };
  const auto rotate = [&](float* x, int heads) {
    backend_.rope(
        {x, std::int64_t{heads} * config_.head_dim, rows, heads, config_.head_dim, cos_, sin_});
  };
  for (std::int32_t i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(i)];
    const SmallWeights& small = small_[static_cast<std::size_t>(i)];
    norm(small.input_norm);
    linear(normed_, layer.q_proj, small.q_bias, q_, rows);
    linear(normed_, layer.k_proj, small.k_bias, k_, rows);
    linear(normed_, layer.v_proj, small.v_bias, v_, rows);
    norm_heads(q_, small.q_norm, config_.num_heads);
    norm_heads(k_, small.k_norm, config_.num_kv_heads);
    rotate(q_, config_.num_heads);
    rotate(k_, config_.num_kv_heads);
    attention.append(i, k_, v_);
    attention.attend(i, q_, mixed_);
    linear(mixed_, layer.o_proj, small.o_bias, hidden_, rows, /*accumulate=*/true);
    norm(small.post_norm);
    linear(normed_, layer.gate_proj, small.gate_bias, gate_, rows);
    linear(normed_, layer.up_proj, small.up_bias, up_, rows);
    backend_.silu_mul({gate_, up_, gate_, std::int64_t{rows} * config_.intermediate_size});
    linear(gate_, layer.down_proj, small.down_bias, hidden_, rows, /*accumulate=*/true);
  }
  num_rows_ = rows;
}

void Transformer::logits(std::int32_t first_row, std::int32_t num_rows, std::span<float> out) {
  require(first_row >= 0 && num_rows >= 0 && first_row + num_rows <= num_rows_, "logits",
          "rows, got ", first_row, " to ", first_row + num_rows, ", accepted up to ", num_rows_);
  require(out.size() ==
              static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(config_.vocab_size),
          "logits", "output size, got ", out.size(), ", accepted ",
          std::int64_t{num_rows} * config_.vocab_size);
  if (num_rows == 0) return;
  const std::int64_t hidden = config_.hidden_size;
  backend_.rms_norm({hidden_ + first_row * hidden, final_norm_.data(), normed_, num_rows, hidden,
                     static_cast<float>(config_.rms_norm_eps)});
  linear(normed_, weights_.lm_head, {}, out.data(), num_rows);
}

}  // namespace twilight
