#ifndef TWILIGHT_MODEL_TOKENIZER_TOKENIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace twilight {

/// Text to token ids and back. Const and safe to share between threads once loaded.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// Ids of `text`. Special tokens written in the text are recognised. Each malformed UTF-8
  /// sequence counts as U+FFFD (maximal subparts, as Python's errors="replace"). With `add_bos` the
  /// ids start with `bos_id()`; throws Error(kInvalidArgument) if there is none. Texts are below
  /// 2^31 bytes.
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text, bool add_bos) const;

  /// Valid UTF-8 of `ids`, special tokens included as their text. Ids that name no token (a model's
  /// padded rows) give nothing.
  [[nodiscard]] virtual std::string decode(std::span<const std::int32_t> ids) const = 0;

  /// What kind it is, for people: "BPE" or "SentencePiece".
  [[nodiscard]] virtual std::string kind() const = 0;

  /// One more than the largest id; a model may have more rows.
  [[nodiscard]] virtual int vocab_size() const = 0;

  /// Bytes that one token adds to a text, maybe part of a character. Unlike `decode`, never drops
  /// the space that some vocabularies put before the first word. Empty for ids that name no token.
  [[nodiscard]] virtual std::string token_bytes(std::int32_t id) const = 0;

  /// Id of a token by its spelling in the file, added tokens first.
  [[nodiscard]] virtual std::optional<std::int32_t> token_to_id(std::string_view token) const = 0;

  [[nodiscard]] std::optional<std::int32_t> bos_id() const { return bos_id_; }

 protected:
  explicit Tokenizer(std::optional<std::int32_t> bos_id) : bos_id_(bos_id) {}

  /// Appends the ids of `text`, which is valid UTF-8.
  virtual void encode_valid(std::string_view text, std::vector<std::int32_t>& ids) const = 0;

 private:
  std::optional<std::int32_t> bos_id_;
};

/// Loads `model_dir`/tokenizer.json, else `model_dir`/tokenizer.model. `bos_id` is what `add_bos`
/// prepends; it comes from the model's config. Throws Error(kNotFound) if the folder has neither,
/// Error(kInvalidFile / kUnsupported) that names file, field, value and what is accepted.
[[nodiscard]] std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_dir,
                                                        std::optional<std::int32_t> bos_id = {});

/// Turns ids that arrive one by one into text, for streaming. The pieces, concatenated, are the
/// `token_bytes` of all ids with malformed sequences replaced by U+FFFD. The tokenizer must outlive
/// it. One object per stream.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}

  /// Text that `id` completes: valid UTF-8, possibly empty. At most 3 bytes stay held back.
  [[nodiscard]] std::string push(std::int32_t id);

  /// What is still held back, as U+FFFD; the decoder is then as new.
  [[nodiscard]] std::string flush();

 private:
  const Tokenizer* tokenizer_;
  std::string held_;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_TOKENIZER_H_
