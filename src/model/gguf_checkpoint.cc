#include "model/gguf_checkpoint.h"

#include <array>
#include <cstring>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "model/gguf_scalar.h"
#include "model/json_reader.h"

namespace twilight {
namespace {

struct NamePair {
  std::string_view gguf;
  std::string_view hugging_face;
};

constexpr std::array<NamePair, 3> kModelNames = {{
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
}};

constexpr std::array<NamePair, 11> kLayerNames = {{
    {"attn_norm", "input_layernorm"},
    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},
    {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"},
    {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"},
    {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},
    {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
}};

constexpr std::string_view kGgufLayer = "blk.";
constexpr std::string_view kLayer = "model.layers.";

std::string translate_layer(std::string_view name, bool to_hugging_face) {
  const std::string_view from = to_hugging_face ? kGgufLayer : kLayer;
  const std::string_view to = to_hugging_face ? kLayer : kGgufLayer;
  if (!name.starts_with(from)) return std::string(name);
  const std::string_view rest = name.substr(from.size());
  const std::size_t dot = rest.find('.');
  const std::size_t last = rest.rfind('.');
  if (dot == std::string_view::npos || last <= dot) return std::string(name);
  const std::string_view part = rest.substr(dot + 1, last - dot - 1);
  for (const NamePair& pair : kLayerNames) {
    if ((to_hugging_face ? pair.gguf : pair.hugging_face) != part) continue;
    return cat(to, rest.substr(0, dot), '.', to_hugging_face ? pair.hugging_face : pair.gguf,
               rest.substr(last));
  }
  return std::string(name);
}

bool is_part(const std::string& name, std::string_view part) {
  return name.ends_with(cat(part, ".weight")) || name.ends_with(cat(part, ".bias"));
}

}  // namespace

std::string hugging_face_name(const std::string& gguf_name) {
  for (const NamePair& pair : kModelNames) {
    if (pair.gguf == gguf_name) return std::string(pair.hugging_face);
  }
  return translate_layer(gguf_name, true);
}

GgufCheckpoint::GgufCheckpoint(std::shared_ptr<const GgufFile> file, const ModelConfig& config)
    : file_(std::move(file)) {
  for (const GgufTensor& tensor : file_->tensors()) {
    // The rotary divisors are part of the configuration.
    if (tensor.name == "rope_freqs.weight" || tensor.name.ends_with("attn_rot_embd")) continue;
    Slot slot{&tensor, file_->bytes().data() + tensor.begin};
    const bool weight_or_bias = tensor.shape.size() <= 2 && tensor.type.has_value();
    if (config.architecture == Architecture::kLlama && weight_or_bias) {
      if (is_part(tensor.name, ".attn_q")) unpermute(slot, config.num_heads, config.head_dim);
      if (is_part(tensor.name, ".attn_k")) unpermute(slot, config.num_kv_heads, config.head_dim);
    }
    tensors_.emplace(hugging_face_name(tensor.name), slot);
  }
}

// Row h D + 2 i + s of the file is row h D + s D / 2 + i of the copy.
void GgufCheckpoint::unpermute(Slot& slot, int heads, int head_dim) {
  const GgufTensor& tensor = *slot.tensor;
  const std::int64_t rows = std::int64_t{heads} * head_dim;
  if (tensor.shape.front() != rows) return;  // refused with its shape when it is taken
  const std::int64_t row_bytes = tensor.bytes / rows;
  // A quantised bias, whose rows are parts of blocks, does not occur and is refused by its shape.
  if (tensor.shape.size() == 1 && is_quantised(*tensor.type)) {
    fail(ErrorCode::kUnsupported, kGgufWhere, file_->path(), ": tensor ", quote_name(tensor.name),
         " type, got ", weight_type_name(*tensor.type), ", accepted F32, F16 or BF16");
  }
  Buffer copy(static_cast<std::size_t>(tensor.bytes));
  std::byte* out = copy.data();
  for (std::int64_t h = 0; h < heads; ++h) {
    for (std::int64_t s = 0; s < 2; ++s) {
      for (std::int64_t i = 0; i < head_dim / 2; ++i) {
        std::memcpy(out, slot.data + (h * head_dim + 2 * i + s) * row_bytes,
                    static_cast<std::size_t>(row_bytes));
        out += row_bytes;
      }
    }
  }
  slot.data = copy.data();
  copies_.push_back(std::move(copy));
}

TensorView GgufCheckpoint::tensor(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    fail(ErrorCode::kInvalidFile, kGgufWhere, file_->path(), ": tensor ",
         quote_name(spelling(name)), ", got nothing, accepted a tensor of that name");
  }
  const GgufTensor& tensor = *it->second.tensor;
  if (!tensor.type) {
    fail(ErrorCode::kUnsupported, kGgufWhere, file_->path(), ": tensor ", quote_name(tensor.name),
         " type, got ", gguf_tensor_type_name(tensor.type_number),
         ", accepted F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K");
  }
  return {tensor.name, *tensor.type, tensor.shape, it->second.data, tensor.bytes};
}

std::vector<std::string> GgufCheckpoint::names() const {
  std::vector<std::string> out;
  out.reserve(tensors_.size());
  for (const auto& [name, slot] : tensors_) out.push_back(name);
  return out;
}

std::string GgufCheckpoint::spelling(const std::string& name) const {
  for (const NamePair& pair : kModelNames) {
    if (pair.hugging_face == name) return std::string(pair.gguf);
  }
  return translate_layer(name, false);
}

}  // namespace twilight
