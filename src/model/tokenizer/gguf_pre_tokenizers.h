#ifndef TWILIGHT_MODEL_TOKENIZER_GGUF_PRE_TOKENIZERS_H_
#define TWILIGHT_MODEL_TOKENIZER_GGUF_PRE_TOKENIZERS_H_

#include <span>
#include <string>
#include <string_view>

namespace twilight {

/// What a name in `tokenizer.ggml.pre` stands for.
struct GgufPreTokenizer {
  std::string_view name;
  /// Patterns in the flavour of tokenizer.json; each cuts the pieces that the one before left, its
  /// matches and what lies between them.
  std::span<const std::string_view> patterns;
  bool ignore_merges = false;  ///< a word that is a token is that token
  bool add_bos = false;        ///< where the file does not say
};

/// Null for a name that is not known.
[[nodiscard]] const GgufPreTokenizer* find_gguf_pre_tokenizer(std::string_view name);

/// All names, for messages.
[[nodiscard]] std::string gguf_pre_tokenizer_names();

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_GGUF_PRE_TOKENIZERS_H_
