#include "model/transformer.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "model/expand_weights.h"

namespace twilight {
namespace {

// `count` elements from `first` on, whole blocks, rounded to f32 at most once.
void read_elements(const TensorView& tensor, std::int64_t first, std::span<float> out) {
  const std::int64_t block = first / weight_block_length(tensor.type);
  dequantise_row(tensor.type, tensor.data + block * weight_block_bytes(tensor.type), out);
}

std::vector<float> to_f32(const TensorView& tensor) {
  if (tensor.data == nullptr) return {};
  std::vector<float> values(static_cast<std::size_t>(tensor.shape[0]));
  read_elements(tensor, 0, values);
  return values;
}

WeightView view_of(const TensorView& tensor) {
  WeightView out;
  out.data = tensor.data;
  out.rows = tensor.shape[0];
  out.cols = tensor.shape[1];
  if (is_quantised(tensor.type)) {
    out.blocks = tensor.type;
  } else if (tensor.type != WeightType::kF32) {
    out.dtype = tensor.type == WeightType::kF16 ? DType::kF16 : DType::kBf16;
  }
  return out;
}

}  // namespace

AttentionPort::~AttentionPort() = default;

Transformer::Transformer(Backend& backend, ThreadPool& pool, const ModelConfig& config,
                         const ModelWeights& weights, std::int32_t max_tokens, bool full_precision)
    : backend_(backend),
      memory_(backend.memory()),
      config_(config),
      weights_(weights),
      max_tokens_(max_tokens),
      full_precision_(full_precision) {
  require(max_tokens >= 1, "transformer", "max_tokens, got ", max_tokens, ", accepted 1 or more");
  for (const float frequency : rope_inverse_frequencies(config)) {
    inverse_frequencies_.push_back(static_cast<double>(frequency));
  }
  for (const LayerWeights& layer : weights.layers) {
    layers_.push_back(
        {matrix(layer.q_proj, pool), matrix(layer.k_proj, pool), matrix(layer.v_proj, pool),
         matrix(layer.o_proj, pool), matrix(layer.gate_proj, pool), matrix(layer.up_proj, pool),
         matrix(layer.down_proj, pool), vector(layer.input_norm), vector(layer.post_norm),
         vector(layer.q_norm), vector(layer.k_norm), vector(layer.q_bias), vector(layer.k_bias),
         vector(layer.v_bias), vector(layer.o_bias), vector(layer.gate_bias), vector(layer.up_bias),
         vector(layer.down_bias)});
  }
  final_norm_ = vector(weights.final_norm);
  lm_head_ = matrix(weights.lm_head, pool);

  const bool host = memory_.is_host();
  if (!host) {
    frequencies_ = DeviceBuffer(memory_, inverse_frequencies_.size() * sizeof(double));
    memory_.upload(frequencies_.data(), inverse_frequencies_.data(), frequencies_.size());
    if (weights.embed.data == weights.lm_head.data) {
      embed_.view = lm_head_.view;
    } else if (!is_quantised(weights.embed.type)) {
      embed_ = matrix(weights.embed, pool);
    }
    if (is_quantised(weights.embed.type)) embed_.view = {};
  }

  const std::int64_t rows = max_tokens_;
  const auto carve = [&](Arena& arena) {
    hidden_ = arena.take<float>("hidden", rows * config_.hidden_size);
    cos_ = arena.take<float>("cos", rows * (config_.head_dim / 2));
    sin_ = arena.take<float>("sin", rows * (config_.head_dim / 2));
    normed_ = arena.take<float>("normed", rows * config_.hidden_size);
    q_ = arena.take<float>("q", rows * config_.q_size());
    k_ = arena.take<float>("k", rows * config_.kv_size());
    v_ = arena.take<float>("v", rows * config_.kv_size());
    mixed_ = arena.take<float>("mixed", rows * config_.q_size());
    gate_ = arena.take<float>("gate", rows * config_.intermediate_size);
    up_ = arena.take<float>("up", rows * config_.intermediate_size);
    if (host) return;
    const std::int64_t logit_rows = std::min<std::int64_t>(rows, kLogitRows);
    logits_ = arena.take<float>("logits", logit_rows * config_.vocab_size);
    draws_ = arena.take<RowDraw>("draws", logit_rows);
    chosen_ = arena.take<std::int32_t>("chosen", logit_rows);
    tokens_ = arena.take<std::int32_t>("tokens", rows);
    positions_ = arena.take<std::int32_t>("positions", rows);
  };
  Arena counter;
  carve(counter);
  activations_ = DeviceBuffer(memory_, counter.used_bytes());
  Arena arena(activations_.data(), activations_.size());
  carve(arena);
  input_hidden_ = hidden_;
  if (host || embed_.view.data != nullptr) return;
  staging_ = Buffer(static_cast<std::size_t>(rows * config_.hidden_size) * sizeof(float));
  input_hidden_ = staging_.as<float>();
}

Transformer::Matrix Transformer::matrix(const TensorView& tensor, ThreadPool& pool) {
  Matrix out;
  out.view = view_of(tensor);
  const bool expand = out.view.quantised() && !backend_.takes_weight_blocks();
  if (memory_.is_host() && !expand) return out;
  Buffer half;
  const std::byte* from = tensor.data;
  auto bytes = static_cast<std::size_t>(tensor.bytes);
  if (expand) {
    half = expand_quantised(tensor, pool);
    from = half.data();
    bytes = half.size();
    out.view.blocks = WeightType::kF32;
    out.view.dtype = DType::kF16;
  }
  out.copy = DeviceBuffer(memory_, bytes);
  memory_.upload(out.copy.data(), from, bytes);
  out.view.data = out.copy.data();
  return out;
}

Transformer::Vector Transformer::vector(const TensorView& tensor) {
  Vector out;
  out.host = to_f32(tensor);
  if (memory_.is_host() || out.host.empty()) return out;
  out.copy = DeviceBuffer(memory_, out.host.size() * sizeof(float));
  memory_.upload(out.copy.data(), out.host.data(), out.copy.size());
  out.host.clear();
  return out;
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
    float* out = input_hidden_ + static_cast<std::int64_t>(row) * hidden;
    read_elements(weights_.embed, tokens[row] * hidden, {out, static_cast<std::size_t>(hidden)});
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

LinearParams Transformer::linear(const float* x, const Matrix& weight, const Vector& bias, float* y,
                                 std::int32_t num_rows, bool accumulate) const {
  LinearParams params;
  params.x = x;
  params.x_stride = weight.view.cols;
  params.num_rows = num_rows;
  params.weight = weight.view;
  params.bias = bias.data();
  params.y = y;
  params.y_stride = weight.view.rows;
  params.accumulate = accumulate;
  params.row_invariant = row_invariant_;
  params.full_precision = full_precision_;
  return params;
}

RmsNormParams Transformer::norm(const float* x, const Vector& weight, float* y,
                                std::int64_t num_rows, std::int64_t size) const {
  RmsNormParams params;
  params.x = x;
  params.weight = weight.data();
  params.y = y;
  params.num_rows = static_cast<std::int32_t>(num_rows);
  params.hidden = size;
  params.eps = static_cast<float>(config_.rms_norm_eps);
  return params;
}

void Transformer::prepare(std::span<const std::int32_t> tokens,
                          std::span<const std::int32_t> positions, bool row_invariant) {
  require(tokens.size() == positions.size() && !tokens.empty() &&
              tokens.size() <= static_cast<std::size_t>(max_tokens_),
          "forward", "number of tokens, got ", tokens.size(), ", accepted 1 to ", max_tokens_);
  check_tokens(tokens);
  row_invariant_ = row_invariant;
  num_rows_ = static_cast<std::int32_t>(tokens.size());
  if (memory_.is_host()) {
    embed(tokens);
    set_rotation(positions);
    return;
  }
  memory_.upload(positions_, positions.data(), positions.size_bytes());
  if (embed_.view.data != nullptr) {
    memory_.upload(tokens_, tokens.data(), tokens.size_bytes());
    return;
  }
  embed(tokens);
  memory_.upload(hidden_, input_hidden_,
                 tokens.size() * static_cast<std::size_t>(config_.hidden_size) * sizeof(float));
}

void Transformer::forward(std::span<const std::int32_t> tokens,
                          std::span<const std::int32_t> positions, AttentionPort& attention,
                          bool row_invariant) {
  prepare(tokens, positions, row_invariant);
  run_layers(attention);
}

void Transformer::run_layers(AttentionPort& attention) {
  const std::int32_t rows = num_rows_;
  const std::int64_t hidden = config_.hidden_size;
  const std::int32_t head_dim = config_.head_dim;
  if (embed_.view.data != nullptr) backend_.embed({embed_.view, tokens_, rows, hidden_});
  if (positions_ != nullptr) {
    backend_.rotation({positions_, frequencies_.as<double>(), rows, head_dim / 2, cos_, sin_});
  }
  const auto rotate = [&](float* x, std::int32_t heads) -> RopeParams {
    return {x, std::int64_t{heads} * head_dim, rows, heads, head_dim, cos_, sin_};
  };
  const auto project_of = [&](const Layer& layer) {
    ProjectParams project;
    project.norm = norm(hidden_, layer.input_norm, normed_, rows, hidden);
    project.q = linear(normed_, layer.q_proj, layer.q_bias, q_, rows);
    project.k = linear(normed_, layer.k_proj, layer.k_bias, k_, rows);
    project.v = linear(normed_, layer.v_proj, layer.v_bias, v_, rows);
    project.q_norm = norm(q_, layer.q_norm, q_, std::int64_t{rows} * config_.num_heads, head_dim);
    project.k_norm =
        norm(k_, layer.k_norm, k_, std::int64_t{rows} * config_.num_kv_heads, head_dim);
    project.q_rope = rotate(q_, config_.num_heads);
    project.k_rope = rotate(k_, config_.num_kv_heads);
    return project;
  };
  ProjectParams project = project_of(layers_.front());
  backend_.project(project);
  AppendKvParams append = attention.append_params(0, k_, v_);
  backend_.append_kv(append);
  for (std::int32_t i = 0; i < config_.num_layers; ++i) {
    const Layer& layer = layers_[static_cast<std::size_t>(i)];
    attention.seal(i);
    attention.attend(i, q_, mixed_);
    AdvanceLayerParams advance;
    advance.out = linear(mixed_, layer.o_proj, layer.o_bias, hidden_, rows, true);
    FeedForwardParams& feed = advance.feed;
    feed.norm = norm(hidden_, layer.post_norm, normed_, rows, hidden);
    feed.gate = linear(normed_, layer.gate_proj, layer.gate_bias, gate_, rows);
    feed.up = linear(normed_, layer.up_proj, layer.up_bias, up_, rows);
    feed.down = linear(gate_, layer.down_proj, layer.down_bias, hidden_, rows, true);
    if (i + 1 < config_.num_layers) {
      project = project_of(layers_[static_cast<std::size_t>(i) + 1]);
      advance.next = &project;
      append = attention.append_params(i + 1, k_, v_);
      advance.append = &append;
    }
    backend_.advance_layer(advance);
  }
}

void Transformer::run_argmax(std::int32_t num_rows) {
  TWILIGHT_DCHECK(logits_ != nullptr && num_rows <= kLogitRows);
  backend_.argmax({logits_, num_rows, config_.vocab_size, chosen_});
}

void Transformer::set_draws(std::span<const RowDraw> draws) {
  TWILIGHT_DCHECK(draws_ != nullptr && draws.size() <= std::size_t{kLogitRows});
  memory_.upload(draws_, draws.data(), draws.size_bytes());
}

void Transformer::run_sample(std::int32_t num_rows) {
  TWILIGHT_DCHECK(logits_ != nullptr && num_rows <= kLogitRows);
  backend_.sample_rows({logits_, num_rows, config_.vocab_size, draws_, chosen_});
}

void Transformer::read_tokens(std::span<std::int32_t> out) {
  TWILIGHT_DCHECK(out.size() <= std::size_t{kLogitRows});
  memory_.download(out.data(), chosen_, out.size_bytes());
}

void Transformer::run_logits(std::int32_t first_row, std::int32_t num_rows) {
  TWILIGHT_DCHECK(logits_ != nullptr && num_rows <= kLogitRows);
  write_logits(first_row, num_rows, logits_);
}

void Transformer::write_logits(std::int32_t first_row, std::int32_t num_rows, float* out) {
  const std::int64_t hidden = config_.hidden_size;
  backend_.rms_norm(norm(hidden_ + first_row * hidden, final_norm_, normed_, num_rows, hidden));
  backend_.linear(linear(normed_, lm_head_, {}, out, num_rows));
}

void Transformer::read_logits(std::int32_t first_row, std::int32_t num_rows, std::span<float> out) {
  TWILIGHT_DCHECK(out.size() ==
                  static_cast<std::size_t>(std::int64_t{num_rows} * config_.vocab_size));
  static_cast<void>(num_rows);
  memory_.download(out.data(), logits_ + std::int64_t{first_row} * config_.vocab_size,
                   out.size_bytes());
}

void Transformer::logits(std::int32_t first_row, std::int32_t num_rows, std::span<float> out) {
  require(first_row >= 0 && num_rows >= 0 && first_row + num_rows <= num_rows_, "logits",
          "rows, got ", first_row, " to ", first_row + num_rows, ", accepted up to ", num_rows_);
  require(out.size() ==
              static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(config_.vocab_size),
          "logits", "output size, got ", out.size(), ", accepted ",
          std::int64_t{num_rows} * config_.vocab_size);
  if (num_rows == 0) return;
  if (memory_.is_host()) {
    write_logits(first_row, num_rows, out.data());
    return;
  }
  const std::int64_t vocab = config_.vocab_size;
  for (std::int32_t row = 0; row < num_rows; row += kLogitRows) {
    const std::int32_t count = std::min(kLogitRows, num_rows - row);
    run_logits(first_row + row, count);
    read_logits(0, count,
                out.subspan(static_cast<std::size_t>(row * vocab),
                            static_cast<std::size_t>(count * vocab)));
  }
}

}  // namespace twilight
