#include <algorithm>
#include <map>

#include "core/check.h"
#include "core/thread_pool.h"
#include "engine/model_impl.h"
#include "model/gguf_checkpoint.h"
#include "model/gguf_config.h"
#include "model/tokenizer/gguf_tokenizer.h"
#include "twilight/engine.h"

namespace twilight {

namespace {

// "bf16", or "Q4_K" as GGUF spells it.
std::string type_name(WeightType type) {
  switch (type) {
    case WeightType::kF32:
      return "f32";
    case WeightType::kF16:
      return "f16";
    case WeightType::kBf16:
      return "bf16";
    default:
      return std::string(weight_type_name(type));
  }
}

std::vector<WeightTypeShare> type_shares(const ModelWeights& weights) {
  std::vector<WeightTypeShare> shares;
  for (const auto& [type, totals] : weights.types) {
    shares.push_back(
        {type_name(type), totals.tensors, totals.parameters, totals.bytes, is_quantised(type)});
  }
  std::stable_sort(
      shares.begin(), shares.end(),
      [](const WeightTypeShare& a, const WeightTypeShare& b) { return a.bytes > b.bytes; });
  return shares;
}

std::string tokenizer_text(const Tokenizer* tokenizer, const GgufFile* gguf) {
  if (tokenizer == nullptr) return {};
  const auto split = gguf == nullptr ? std::nullopt : gguf->string("tokenizer.ggml.pre");
  return split && tokenizer->kind() == "BPE" ? cat("BPE, split as ", *split) : tokenizer->kind();
}

// The type that most bytes of the matrices have.
std::string main_type(const ModelWeights& weights) {
  std::map<WeightType, std::int64_t> bytes;
  for (const LayerWeights& layer : weights.layers) {
    for (const TensorView* matrix : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                     &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
      bytes[matrix->type] += matrix->bytes;
    }
  }
  const auto most = std::max_element(
      bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return type_name(most->first);
}

// The template of a GGUF file's metadata; nothing without one, or without a tokenizer.
std::optional<ChatTemplate> gguf_chat_template(const GgufFile& gguf, const Model::Impl& impl) {
  const auto jinja = gguf.string("tokenizer.chat_template");
  if (!jinja || impl.tokenizer == nullptr) return std::nullopt;
  const auto text_of = [&](std::optional<std::int32_t> token) {
    return token ? impl.tokenizer->token_bytes(*token) : std::string();
  };
  const auto& ends = impl.config.eos_token_ids;
  return ChatTemplate::detect(
      *jinja, text_of(impl.config.bos_token_id),
      text_of(ends.empty() ? std::nullopt : std::optional<std::int32_t>(ends.front())));
}

}  // namespace

Model::Model(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;
Model::Model(const Model&) = default;
Model& Model::operator=(const Model&) = default;

Model Model::load(const std::string& directory, const Progress& progress) {
  auto impl = std::make_shared<Impl>();
  ModelConfig& config = impl->config;
  std::shared_ptr<const GgufFile> gguf;
  if (const auto path = find_gguf(directory)) {
    gguf = std::make_shared<const GgufFile>(*path);
    config = gguf_config(*gguf);
    config.add_bos = gguf_adds_bos(*gguf);
  } else {
    config = load_config(directory);
  }
  try {
    impl->tokenizer = gguf != nullptr ? load_gguf_tokenizer(*gguf, config.bos_token_id)
                                      : load_tokenizer(directory, config.bos_token_id);
  } catch (const Error& error) {
    // Without a tokenizer the model still runs on token ids; encode and decode say what is missing.
    if (error.code() != ErrorCode::kNotFound) throw;
    impl->no_tokenizer = error.what();
  }
  try {
    impl->chat = gguf != nullptr ? gguf_chat_template(*gguf, *impl) : load_chat_template(directory);
    if (!impl->chat) {
      impl->no_chat =
          cat("[chat template] no template, got ", directory,
              ", accepted a model whose tokenizer_config.json has chat_template, or whose GGUF "
              "metadata has tokenizer.chat_template, or a name: ",
              ChatTemplate::family_names());
    }
  } catch (const Error& error) {
    // Completions need no template; chat says what is wrong with it.
    if (error.code() != ErrorCode::kUnsupported) throw;
    impl->no_chat = error.what();
  }
  if (impl->tokenizer != nullptr && impl->tokenizer->vocab_size() > config.vocab_size) {
    fail(ErrorCode::kInvalidFile, "model", directory, ": tokenizer vocabulary, got ",
         impl->tokenizer->vocab_size(), " tokens, accepted up to the vocab_size ",
         config.vocab_size, " of the model");
  }
  ThreadPool pool(0);
  LoadOptions options;
  options.pool = &pool;
  options.progress = progress;
  impl->weights =
      gguf != nullptr
          ? load_weights(std::make_shared<const GgufCheckpoint>(gguf, config), config, options)
          : load_weights(directory, config, options);

  ModelInfo& info = impl->info;
  info.path = gguf != nullptr ? gguf->path() : directory;
  info.format = gguf != nullptr ? cat("gguf v", gguf->version()) : "safetensors";
  info.architecture = architecture_name(config.architecture);
  info.num_layers = config.num_layers;
  info.hidden_size = config.hidden_size;
  info.intermediate_size = config.intermediate_size;
  info.num_q_heads = config.num_heads;
  info.num_kv_heads = config.num_kv_heads;
  info.head_dim = config.head_dim;
  info.vocab_size = config.vocab_size;
  info.max_context = narrow<std::int32_t>(
      std::min<std::int64_t>(max_context_length(config), std::int64_t{1} << 30));
  info.sliding_window = config.sliding_window;
  info.rope = rope_scaling_name(config.rope.scaling);
  info.rope_theta = config.rope.theta;
  info.parameters = impl->weights.parameters;
  info.weight_bytes = impl->weights.bytes;
  info.weight_dtype = main_type(impl->weights);
  info.weight_types = type_shares(impl->weights);
  info.tied_embeddings = config.tie_word_embeddings;
  info.tokenizer = tokenizer_text(impl->tokenizer.get(), gguf.get());
  info.chat_template = impl->chat ? impl->chat->family() : std::string();
  info.no_chat_template = impl->no_chat;
  info.bos_token = config.bos_token_id;
  info.eos_tokens.assign(config.eos_token_ids.begin(), config.eos_token_ids.end());
  return Model(std::move(impl));
}

const ModelInfo& Model::info() const { return impl_->info; }

std::vector<std::int32_t> Model::encode(std::string_view text, bool add_bos) const {
  return impl_->text_tokenizer().encode(
      text, add_bos && impl_->config.add_bos && impl_->config.bos_token_id.has_value());
}

std::string Model::decode(std::span<const std::int32_t> ids) const {
  return impl_->text_tokenizer().decode(ids);
}

std::string Model::token_bytes(std::int32_t id) const {
  return impl_->text_tokenizer().token_bytes(id);
}

struct TextStream::Impl {
  Model model;  // keeps the tokenizer alive
  StreamDecoder decoder;
};

TextStream::TextStream(const Model& model)
    : impl_(std::make_unique<Impl>(Impl{model, StreamDecoder(model.impl().text_tokenizer())})) {}
TextStream::~TextStream() = default;
TextStream::TextStream(TextStream&&) noexcept = default;
TextStream& TextStream::operator=(TextStream&&) noexcept = default;
std::string TextStream::push(std::int32_t token) { return impl_->decoder.push(token); }
std::string TextStream::flush() { return impl_->decoder.flush(); }

}  // namespace twilight
