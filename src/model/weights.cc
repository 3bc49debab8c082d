#include "model/weights.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "model/finite_scan.h"
#include "model/json_reader.h"
#include "model/safetensors.h"

namespace twilight {
namespace {

constexpr std::string_view kWhere = "weights";
constexpr std::int64_t kScanChunkBytes = std::int64_t{4} << 20;
// Chunks between two reports of progress.
constexpr std::int64_t kScanGroupChunks = 64;

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += cat(i == 0 ? "" : ", ", shape[i]);
  return out + ']';
}

// Hands out tensors by name, checks their shapes and remembers which were used.
class TensorPicker {
 public:
  TensorPicker(const TensorSource& source, ModelWeights& totals)
      : source_(source), totals_(totals) {}

  TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) {
    if (!source_.contains(name)) {
      fail(ErrorCode::kInvalidFile, kWhere, source_.path_of(name), ": tensor ",
           quote_name(source_.spelling(name)), ", got nothing, accepted shape ", shape_text(shape));
    }
    TensorView view = source_.tensor(name);
    if (view.shape != shape) {
      fail(ErrorCode::kInvalidFile, kWhere, source_.path_of(name), ": tensor ",
           quote_name(source_.spelling(name)), " shape, got ", shape_text(view.shape),
           ", accepted ", shape_text(shape));
    }
    totals_.parameters += view.elements();
    totals_.bytes += view.bytes;
    WeightTotals& type = totals_.types[view.type];
    ++type.tensors;
    type.parameters += view.elements();
    type.bytes += view.bytes;
    used_.insert(name);
    taken_.push_back(view);
    return view;
  }

  TensorView take_if(bool wanted, const std::string& name, const std::vector<std::int64_t>& shape) {
    return wanted ? take(name, shape) : TensorView{};
  }

  // Throws for a tensor that nobody took.
  void check_all_used(bool tied) const {
    for (const std::string& name : source_.names()) {
      if (used_.count(name) != 0 || name.ends_with("rotary_emb.inv_freq")) continue;
      if (tied && name == "lm_head.weight") continue;
      fail(ErrorCode::kInvalidFile, kWhere, source_.path_of(name), ": tensor ",
           quote_name(source_.spelling(name)),
           ", got one that the configuration has no place for, accepted only the model's own "
           "tensors");
    }
  }

  [[nodiscard]] const std::vector<TensorView>& taken() const { return taken_; }

 private:
  const TensorSource& source_;
  ModelWeights& totals_;
  std::set<std::string> used_;
  std::vector<TensorView> taken_;
};

LayerWeights take_layer(TensorPicker& picker, const ModelConfig& config, int index) {
  const std::string layer = cat("model.layers.", index, '.');
  const std::string attention = layer + "self_attn.";
  const std::string mlp = layer + "mlp.";
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t inner = config.intermediate_size;
  const std::int64_t q = config.q_size();
  const std::int64_t kv = config.kv_size();
  LayerWeights out;
  out.input_norm = picker.take(layer + "input_layernorm.weight", {hidden});
  out.q_proj = picker.take(attention + "q_proj.weight", {q, hidden});
  out.k_proj = picker.take(attention + "k_proj.weight", {kv, hidden});
  out.v_proj = picker.take(attention + "v_proj.weight", {kv, hidden});
  out.o_proj = picker.take(attention + "o_proj.weight", {hidden, q});
  out.q_bias = picker.take_if(config.qkv_bias, attention + "q_proj.bias", {q});
  out.k_bias = picker.take_if(config.qkv_bias, attention + "k_proj.bias", {kv});
  out.v_bias = picker.take_if(config.qkv_bias, attention + "v_proj.bias", {kv});
  out.o_bias = picker.take_if(config.o_bias, attention + "o_proj.bias", {hidden});
  out.q_norm = picker.take_if(config.qk_norm, attention + "q_norm.weight", {config.head_dim});
  out.k_norm = picker.take_if(config.qk_norm, attention + "k_norm.weight", {config.head_dim});
  out.post_norm = picker.take(layer + "post_attention_layernorm.weight", {hidden});
  out.gate_proj = picker.take(mlp + "gate_proj.weight", {inner, hidden});
  out.up_proj = picker.take(mlp + "up_proj.weight", {inner, hidden});
  out.down_proj = picker.take(mlp + "down_proj.weight", {hidden, inner});
  out.gate_bias = picker.take_if(config.mlp_bias, mlp + "gate_proj.bias", {inner});
  out.up_bias = picker.take_if(config.mlp_bias, mlp + "up_proj.bias", {inner});
  out.down_bias = picker.take_if(config.mlp_bias, mlp + "down_proj.bias", {hidden});
  return out;
}

const char* non_finite_name(const TensorView& tensor, std::int64_t element) {
  if (is_quantised(tensor.type)) return "a scale that is NaN or infinite";
  const int size = weight_block_bytes(tensor.type);
  std::uint32_t bits = 0;
  for (int byte = 0; byte < size; ++byte) {
    bits |= std::to_integer<std::uint32_t>(tensor.data[element * size + byte]) << (8 * byte);
  }
  std::uint32_t mantissa = bits & 0x007fffffU;
  if (tensor.type == WeightType::kF16) mantissa = bits & 0x03ffU;
  if (tensor.type == WeightType::kBf16) mantissa = bits & 0x007fU;
  if (mantissa != 0) return "NaN";
  return (bits >> (8 * size - 1)) != 0 ? "-infinity" : "infinity";
}

// Scans all tensors in chunks, and throws for the first bad element in the order of `tensors`,
// whatever the number of threads.
void check_finite(const std::vector<TensorView>& tensors, const TensorSource& source,
                  const LoadOptions& options) {
  struct Chunk {
    const TensorView* tensor;
    std::int64_t offset;
    std::int64_t bytes;
  };
  std::vector<Chunk> chunks;
  for (const TensorView& tensor : tensors) {
    const std::int64_t block = weight_block_bytes(tensor.type);
    const std::int64_t step = kScanChunkBytes / block * block;
    for (std::int64_t offset = 0; offset < tensor.bytes; offset += step) {
      chunks.push_back({&tensor, offset, std::min(step, tensor.bytes - offset)});
    }
  }
  const auto count = static_cast<std::int64_t>(chunks.size());
  std::atomic<std::int64_t> first_bad{count};
  const auto scan = [&](std::int64_t index, int /*worker*/) {
    if (index > first_bad.load(std::memory_order_relaxed)) return;
    const Chunk& chunk = chunks[static_cast<std::size_t>(index)];
    if (!has_non_finite(chunk.tensor->type, chunk.tensor->data + chunk.offset, chunk.bytes)) {
      return;
    }
    std::int64_t seen = first_bad.load(std::memory_order_relaxed);
    while (index < seen && !first_bad.compare_exchange_weak(seen, index)) {
    }
  };
  std::int64_t total_bytes = 0;
  for (const Chunk& chunk : chunks) total_bytes += chunk.bytes;
  std::int64_t done_bytes = 0;
  for (std::int64_t begin = 0; begin < count; begin += kScanGroupChunks) {
    const std::int64_t group = std::min(kScanGroupChunks, count - begin);
    const auto scan_in_group = [&](std::int64_t i, int worker) { scan(begin + i, worker); };
    if (options.pool != nullptr) {
      options.pool->parallel_for(group, scan_in_group);
    } else {
      for (std::int64_t i = 0; i < group; ++i) scan_in_group(i, 0);
    }
    for (std::int64_t i = 0; i < group; ++i) {
      done_bytes += chunks[static_cast<std::size_t>(begin + i)].bytes;
    }
    if (options.progress) (void)options.progress(done_bytes, total_bytes);
  }
  if (first_bad == count) return;
  const Chunk& chunk = chunks[static_cast<std::size_t>(first_bad.load())];
  const TensorView& tensor = *chunk.tensor;
  const std::int64_t element =
      chunk.offset / weight_block_bytes(tensor.type) * weight_block_length(tensor.type) +
      find_non_finite(tensor.type, tensor.data + chunk.offset, chunk.bytes);
  fail(ErrorCode::kInvalidFile, kWhere, source.path_of(tensor.name), ": tensor ",
       quote_name(tensor.name), " element ", element, " of ", tensor.elements(), ", got ",
       non_finite_name(tensor, element), ", accepted finite numbers");
}

}  // namespace

ModelWeights load_weights(const std::string& model_dir, const ModelConfig& config,
                          const LoadOptions& options) {
  return load_weights(std::make_shared<const Checkpoint>(model_dir), config, options);
}

ModelWeights load_weights(std::shared_ptr<const TensorSource> source, const ModelConfig& config,
                          const LoadOptions& options) {
  ModelWeights out;
  out.source = std::move(source);
  TensorPicker picker(*out.source, out);
  const std::vector<std::int64_t> table = {config.vocab_size, config.hidden_size};
  out.embed = picker.take("model.embed_tokens.weight", table);
  out.layers.reserve(static_cast<std::size_t>(config.num_layers));
  for (int i = 0; i < config.num_layers; ++i) out.layers.push_back(take_layer(picker, config, i));
  out.final_norm = picker.take("model.norm.weight", {config.hidden_size});
  out.lm_head = config.tie_word_embeddings ? out.embed : picker.take("lm_head.weight", table);
  picker.check_all_used(config.tie_word_embeddings);
  if (options.check_finite) check_finite(picker.taken(), *out.source, options);
  out.source->check_unchanged();
  return out;
}

}  // namespace twilight
