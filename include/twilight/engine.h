#ifndef TWILIGHT_ENGINE_H_
#define TWILIGHT_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "twilight/device.h"
#include "twilight/export.h"
#include "twilight/kv_cache.h"
#include "twilight/policy.h"
#include "twilight/stats.h"

namespace twilight {

/// Called during long work with what is done and the total, in the caller's thread. Returning false
/// stops the work at the next convenient place.
using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

/// The tensors of one element type.
struct WeightTypeShare {
  std::string name;  ///< "bf16", or "Q4_K" as GGUF spells it
  std::int64_t tensors = 0, parameters = 0, bytes = 0;
  bool blocks = false;  ///< quantised: groups of weights that share scales
};

struct ModelInfo {
  std::string path;          ///< the folder, or the GGUF file
  std::string format;        ///< "safetensors" or "gguf v3"
  std::string architecture;  ///< e.g. "LlamaForCausalLM"
  std::int32_t num_layers = 0, hidden_size = 0, intermediate_size = 0;
  std::int32_t num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int32_t vocab_size = 0;
  std::int32_t max_context = 0;  ///< tokens the model was made for, at most its sliding window
  /// Tokens that a token attends to, itself included, where that is less than the model was made
  /// for.
  std::optional<std::int64_t> sliding_window;
  std::string rope;  ///< "default", "linear" or "llama3"
  double rope_theta = 0;
  std::int64_t parameters = 0;
  std::int64_t weight_bytes = 0;
  std::string weight_dtype;  ///< of most bytes of the layers: "bf16", or "Q4_K" as GGUF spells it
  std::vector<WeightTypeShare> weight_types;  ///< of all tensors, most bytes first
  bool tied_embeddings = false;
  std::string tokenizer;      ///< "BPE", "SentencePiece", "BPE, split as llama-bpe"; empty: none
  std::string chat_template;  ///< family of the checkpoint's own; empty: none that is known
  /// Why `chat_template` is empty.
  std::string no_chat_template;
  std::optional<std::int32_t> bos_token;
  std::vector<std::int32_t> eos_tokens;
};

/// One message of a conversation.
struct ChatMessage {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// A checkpoint: a folder in Hugging Face form (config.json, safetensors, tokenizer.json or
/// tokenizer.model) or a GGUF file, alone or the only one of a folder. The files are mapped, not
/// copied. Renaming another file over one, or removing it, does not touch a loaded model; a file
/// that is written to while it loads is refused, and one that is shortened in place after that is a
/// fault of the process. Const and thread-safe once loaded; copies share it.
class TWILIGHT_API Model {
 public:
  /// Throws Error naming file, field, value and what is accepted. Every weight is checked to be
  /// finite.
  static Model load(const std::string& directory, const Progress& progress = {});
  ~Model();
  Model(const Model&);
  Model& operator=(const Model&);

  [[nodiscard]] const ModelInfo& info() const;
  /// Token ids of a text; begins with the model's first token where it has one and `add_bos` is
  /// set.
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text, bool add_bos = true) const;
  /// Valid UTF-8.
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const;
  /// Bytes one token adds; maybe part of a character.
  [[nodiscard]] std::string token_bytes(std::int32_t id) const;

  /// Whether the checkpoint has a chat template of a known family.
  [[nodiscard]] bool has_chat_template() const;
  /// The conversation as the model was trained to read it, ready for the assistant's answer with
  /// `add_generation_prompt`. The first token is part of the text where the template has it: encode
  /// with add_bos = false. `family` names a template to use in place of the checkpoint's own:
  /// chatml, gemma, llama-2, llama-3, mistral-v1, mistral-v3, vicuna, zephyr. Throws Error for a
  /// checkpoint without a known template, and for roles the template does not know.
  [[nodiscard]] std::string chat_prompt(std::span<const ChatMessage> messages,
                                        bool add_generation_prompt = true,
                                        std::string_view family = {}) const;
  /// Tokens that end a turn of the assistant, those of ModelInfo::eos_tokens included; `family` as
  /// above.
  [[nodiscard]] std::vector<std::int32_t> chat_stop_tokens(std::string_view family = {}) const;

  struct Impl;
  [[nodiscard]] const Impl& impl() const { return *impl_; }

 private:
  explicit Model(std::shared_ptr<const Impl> impl);
  std::shared_ptr<const Impl> impl_;
};

/// Assembles streamed tokens into valid UTF-8, holding back incomplete characters. One per stream.
class TWILIGHT_API TextStream {
 public:
  explicit TextStream(const Model& model);
  ~TextStream();
  TextStream(TextStream&&) noexcept;
  TextStream& operator=(TextStream&&) noexcept;
  [[nodiscard]] std::string push(std::int32_t token);
  [[nodiscard]] std::string flush();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct EngineOptions {
  SparsePolicy policy;
  std::int32_t max_context = 0;  ///< longest sequence in tokens; 0 takes the model's
  std::int32_t max_seqs = 1;     ///< largest decode batch
  std::int64_t cache_tokens =
      0;  ///< cache capacity in tokens over all sequences; 0: max_seqs * max_context
  std::int32_t page_size = 16;
  DType cache_dtype = DType::kBf16;
  /// kAutoChunk takes 512 on a CPU and 2048 on a GPU.
  static constexpr std::int32_t kAutoChunk = -1;
  std::int32_t prefill_chunk = kAutoChunk;  ///< tokens run at once
  bool full_precision = false;              ///< f32 products in prefill, for exact comparisons
};

/// How a token is drawn from logits: from the first `top_k` of them (larger ones first, of equal
/// ones the lower id), cut to the shortest beginning that holds `top_p` of their softmax at this
/// temperature, the one at which the share of that beginning passes `uniform`.
struct TokenDraw {
  double temperature = 0;  ///< 0: the likeliest token, the first of equal ones
  std::int32_t top_k = 0;  ///< 0: off
  double top_p = 1;        ///< (0, 1]
  double uniform = 0;      ///< a random number, [0, 1)
};

/// What one sequence of a decode step gives back.
struct DecodeRow {
  std::optional<TokenDraw> draw;  ///< draws `token` where the logits are; empty: none is drawn
  std::span<float> logits;        ///< [vocab], takes the logits; empty: they stay where they are
  std::int32_t token = -1;        ///< -1: none, or logits with NaN or without a finite maximum
};

/// Runs a model over a paged cache: dense chunked prefill, decode through the policy. Not
/// thread-safe.
class TWILIGHT_API Engine {
 public:
  Engine(const Device& device, const Model& model, const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  [[nodiscard]] const Model& model() const;
  [[nodiscard]] const Device& device() const;
  [[nodiscard]] KvCache& cache();
  [[nodiscard]] const KvCache& cache() const;
  [[nodiscard]] const EngineOptions& options() const;
  /// The policy in force, with dense_below_tokens settled.
  [[nodiscard]] const SparsePolicy& policy() const;
  /// Changes the policy; the index of pages in use is recomputed where its planes differ.
  /// Forgets the policies of `add_policy`.
  void set_policy(const SparsePolicy& policy);
  /// Whether the cache's index has what a policy reads, so that `add_policy` takes it.
  [[nodiscard]] bool serves(const SparsePolicy& policy) const;
  /// A further policy that decode steps may run by, for engines that serve several at once. Returns
  /// its number for `decode`; the engine's own is 0. Throws Error(kInvalidArgument) where the cache
  /// lacks its index planes.
  [[nodiscard]] std::int32_t add_policy(const SparsePolicy& policy);
  /// Gives the number of an added policy, and its memory, back. Throws Error(kInvalidArgument) for
  /// another number.
  void drop_policy(std::int32_t number);

  enum class Status {
    kOk,
    kOutOfPages,  ///< nothing has changed; free a sequence and try again
    kCancelled,   ///< `progress` said so; the sequence holds what was done
  };

  /// Runs tokens after what the sequence holds, densely. Logits [vocab] of the last token go to
  /// `logits` unless it is empty. Throws Error(kInvalidArgument) where the context would pass
  /// max_context.
  [[nodiscard]] Status prefill(Sequence& sequence, std::span<const std::int32_t> tokens,
                               std::span<float> logits = {}, const Progress& progress = {});

  /// The same, and shows the logits [vocab] after each of the tokens, in order, with the token's
  /// number in `tokens`.
  using LogitsVisitor = std::function<void(std::int64_t token, std::span<const float> logits)>;
  [[nodiscard]] Status prefill_scored(Sequence& sequence, std::span<const std::int32_t> tokens,
                                      const LogitsVisitor& visit);

  /// One token for each of B sequences; logits [B, vocab]. `policy` is 0 or a number of
  /// `add_policy`.
  [[nodiscard]] Status decode(std::span<Sequence* const> sequences,
                              std::span<const std::int32_t> tokens, std::span<float> logits,
                              std::int32_t policy = 0);

  /// The same with greedy sampling where the logits are: `next` [B] takes each sequence's likeliest
  /// token, the first of equal ones. Throws Error(kInvalidArgument) for logits with NaN or without
  /// a finite maximum.
  [[nodiscard]] Status decode_greedy(std::span<Sequence* const> sequences,
                                     std::span<const std::int32_t> tokens,
                                     std::span<std::int32_t> next, std::int32_t policy = 0);

  /// The same with what each sequence's row asks for. Only drawn tokens, and logits that are asked
  /// for, leave the device. Devices agree on a token but where a random number falls within the
  /// rounding of a boundary between two of them.
  [[nodiscard]] Status decode_rows(std::span<Sequence* const> sequences,
                                   std::span<const std::int32_t> tokens, std::span<DecodeRow> rows,
                                   std::int32_t policy = 0);

  /// Statistics of decode steps: per layer and sequence of the last step, and totals since
  /// `reset_totals`. `audit` adds the true kept mass, at the price of reading every key.
  void collect_stats(bool on, bool audit = false);
  [[nodiscard]] std::span<const LayerStats> last_stats(std::int32_t layer) const;
  [[nodiscard]] const DecodeTotals& totals() const;
  void reset_totals();

  /// Shows every decode step's rotated queries [B, Hq, D] of each layer to `observer`, before the
  /// attention; an empty one stops it. For studies of real queries; the data lives for the call
  /// only.
  void observe_queries(std::function<void(std::int32_t layer, const float* q)> observer);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct SamplingOptions {
  double temperature = 0;  ///< 0: greedy
  std::int32_t top_k = 0;  ///< 0: off
  double top_p = 1;        ///< nucleus of the sampler, (0, 1]
  std::uint64_t seed = 0;
};

/// Draws tokens from logits. The same seed and logits give the same tokens on every machine.
class TWILIGHT_API Sampler {
 public:
  /// Throws Error(kInvalidArgument) naming the option.
  explicit Sampler(const SamplingOptions& options);
  [[nodiscard]] std::int32_t sample(std::span<const float> logits);
  /// What `sample` would do next, for Engine::decode_rows; takes the random number it would take.
  [[nodiscard]] TokenDraw draw();

 private:
  SamplingOptions options_;
  std::uint64_t state_;
  std::vector<std::pair<float, std::int32_t>> sorted_;
};

enum class FinishReason { kStop, kLength, kCancelled, kOutOfPages };
/// "stop", "length", "cancelled", "out of pages".
[[nodiscard]] TWILIGHT_API std::string_view finish_reason_name(FinishReason reason);

struct GenerateOptions {
  std::int32_t max_tokens = 128;
  SamplingOptions sampling;
  bool stop_at_eos = true;
  std::vector<std::int32_t> stop_tokens;  ///< end tokens beside the model's own
  /// Called for every token, the first included; returning false ends the generation after it.
  std::function<bool(std::int32_t token)> on_token;
  /// Called after every decode step, when the engine's last_stats are those of the step.
  std::function<void()> on_step;
};

struct GenerateResult {
  std::vector<std::int32_t> tokens;  ///< without the end token
  FinishReason reason = FinishReason::kLength;
  double decode_seconds = 0;  ///< of the decode steps
  std::int64_t decode_steps = 0;
};

/// Continues a sequence whose last logits are `logits` [vocab] (from prefill or decode).
[[nodiscard]] TWILIGHT_API GenerateResult generate(Engine& engine, Sequence& sequence,
                                                   std::span<const float> logits,
                                                   const GenerateOptions& options);

/// GB/s that the device's threads read from memory, best of a few passes over `bytes` of distinct
/// memory.
[[nodiscard]] TWILIGHT_API double measure_read_bandwidth(const Device& device,
                                                         std::int64_t bytes = std::int64_t{1}
                                                                              << 29);

}  // namespace twilight

#endif  // TWILIGHT_ENGINE_H_
