#include <algorithm>
#include <utility>
#include <vector>

#include "paths.h"
#include "progress.h"
#include "twilight/error.h"
#include "workload.h"

namespace twilight::app {
namespace {

/// Keys and values of the whole text, and the query of every decode step.
struct Captured {
  std::string model, text;
  LayerShape shape;
  std::int32_t layer = 0;
  std::int32_t first_length = 0;  // N of sequence 0; one more for each that follows
  std::vector<float> k, v;        // [N, Hkv, D]
  std::vector<float> queries;     // [steps, Hq, D]
};

class CapturedWorkload final : public Workload {
 public:
  explicit CapturedWorkload(Captured data) : data_(std::move(data)) {}

  [[nodiscard]] LayerShape shape() const override { return data_.shape; }
  [[nodiscard]] std::int32_t num_tokens(std::int32_t seq) const override {
    return data_.first_length + seq;
  }
  void prepare(std::int32_t seq) override { seq_ = seq; }
  void tokens(std::int32_t first, std::int32_t count, float* k, float* v) const override {
    const std::int64_t row = std::int64_t{data_.shape.num_kv_heads} * data_.shape.head_dim;
    std::copy_n(data_.k.data() + first * row, count * row, k);
    std::copy_n(data_.v.data() + first * row, count * row, v);
  }
  [[nodiscard]] std::span<const float> query() const override {
    const auto row = static_cast<std::size_t>(data_.shape.num_q_heads * data_.shape.head_dim);
    return std::span(data_.queries).subspan(static_cast<std::size_t>(seq_) * row, row);
  }
  [[nodiscard]] nlohmann::ordered_json json() const override {
    nlohmann::ordered_json out;
    out["kind"] = "model";
    out["model"] = data_.model;
    out["text"] = data_.text;
    out["layer"] = data_.layer;
    out["first_length"] = data_.first_length;
    return out;
  }
  [[nodiscard]] std::string text() const override {
    const auto row = static_cast<std::size_t>(data_.shape.num_q_heads * data_.shape.head_dim);
    const auto last =
        data_.first_length + static_cast<std::int32_t>(data_.queries.size() / row) - 1;
    return "layer " + std::to_string(data_.layer) + " of " + data_.model + " reading " +
           data_.text + "; " + std::to_string(data_.first_length) + " to " + std::to_string(last) +
           " tokens, every sequence with its own query";
  }

 private:
  Captured data_;
  std::int32_t seq_ = 0;
};

}  // namespace

std::int32_t capture_layer(const ModelInfo& info, std::int32_t layer) {
  if (layer >= info.num_layers) {
    throw Error(ErrorCode::kInvalidArgument, "[bench] --layer, got " + std::to_string(layer) +
                                                 ", accepted 0 to " +
                                                 std::to_string(info.num_layers - 1));
  }
  return layer < 0 ? info.num_layers / 2 : layer;
}

std::unique_ptr<Workload> capture_workload(const Device& device, const Model& model,
                                           const CaptureOptions& options, bool show_progress) {
  const std::string text = read_text(options.text_file);
  const ModelInfo& info = model.info();
  Captured data;
  data.model = info.path;
  data.text = options.text_file;
  data.shape = {info.num_q_heads, info.num_kv_heads, info.head_dim};
  data.layer = capture_layer(info, options.layer);
  const std::int32_t prefill = options.num_tokens - options.num_seqs;
  if (prefill < 1) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] --ctx, got " + std::to_string(options.num_tokens) +
                    ", accepted more than the " + std::to_string(options.num_seqs) +
                    " sequences, each one token longer than the one before");
  }
  const std::vector<std::int32_t> tokens = model.encode(text);
  if (static_cast<std::int64_t>(tokens.size()) < options.num_tokens) {
    throw Error(ErrorCode::kInvalidArgument,
                "[bench] text " + options.text_file + ", got " + std::to_string(tokens.size()) +
                    " tokens, accepted at least --ctx " + std::to_string(options.num_tokens));
  }
  EngineOptions engine_options;
  engine_options.policy = make_policy("dense");
  engine_options.max_context = options.num_tokens;
  Engine engine(device, model, engine_options);
  Sequence sequence = engine.cache().new_sequence();
  {
    ProgressBar bar("Reading the text", "tokens", show_progress);
    if (engine.prefill(sequence, std::span(tokens).first(static_cast<std::size_t>(prefill)), {},
                       bar.callback()) != Engine::Status::kOk) {
      return nullptr;
    }
  }
  data.first_length = prefill + 1;
  const std::size_t row = static_cast<std::size_t>(info.num_q_heads * info.head_dim);
  engine.observe_queries([&](std::int32_t layer, const float* q) {
    if (layer == data.layer) data.queries.insert(data.queries.end(), q, q + row);
  });
  std::vector<float> logits(static_cast<std::size_t>(info.vocab_size));
  Sequence* const batch[] = {&sequence};
  for (std::int32_t i = 0; i < options.num_seqs; ++i) {
    const std::int32_t next[] = {tokens[static_cast<std::size_t>(prefill + i)]};
    if (engine.decode(batch, next, logits) != Engine::Status::kOk) {
      throw Error(ErrorCode::kInternal, "[bench] the cache made for the text ran out of pages");
    }
  }
  const std::size_t size = static_cast<std::size_t>(sequence.num_tokens()) *
                           static_cast<std::size_t>(info.num_kv_heads * info.head_dim);
  data.k.resize(size);
  data.v.resize(size);
  engine.cache().read(sequence, data.layer, data.k.data(), data.v.data());
  return std::make_unique<CapturedWorkload>(std::move(data));
}

}  // namespace twilight::app
