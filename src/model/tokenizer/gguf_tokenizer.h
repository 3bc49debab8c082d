#ifndef TWILIGHT_MODEL_TOKENIZER_GGUF_TOKENIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_GGUF_TOKENIZER_H_

#include <memory>
#include <optional>

#include "model/gguf.h"
#include "model/tokenizer/tokenizer.h"

namespace twilight {

/// Tokenizer from the metadata of a GGUF file: `tokenizer.ggml.model` "gpt2" (byte-level BPE, words
/// by `tokenizer.ggml.pre`) or "llama" (pieces merged by score, with byte fallback), token for
/// token as llama.cpp reads it. `bos_id` is what `add_bos` prepends. Throws Error(kNotFound) where
/// the file names no tokenizer, Error(kInvalidFile / kUnsupported) `[gguf] path: key, got VALUE,
/// accepted SET`.
[[nodiscard]] std::unique_ptr<Tokenizer> load_gguf_tokenizer(const GgufFile& file,
                                                             std::optional<std::int32_t> bos_id);

/// Whether texts start with the first token: `tokenizer.ggml.add_bos_token`, else what the kind of
/// tokenizer means.
[[nodiscard]] bool gguf_adds_bos(const GgufFile& file);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_GGUF_TOKENIZER_H_
