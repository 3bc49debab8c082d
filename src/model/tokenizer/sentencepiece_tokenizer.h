#ifndef TWILIGHT_MODEL_TOKENIZER_SENTENCEPIECE_TOKENIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_SENTENCEPIECE_TOKENIZER_H_

#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "model/tokenizer/tokenizer.h"

namespace twilight {

/// Tokenizer from the bytes of a SentencePiece tokenizer.model. Control and unknown pieces (<s>,
/// </s>, <unk>) are recognised in a text, and shown in decoded text, as their spelling; each
/// stretch between them is encoded as a text of its own. `file` names it in messages. Throws
/// Error(kInvalidFile).
[[nodiscard]] std::unique_ptr<Tokenizer> load_sentencepiece_tokenizer(
    std::string_view bytes, const std::string& file, std::optional<std::int32_t> bos_id = {});

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_SENTENCEPIECE_TOKENIZER_H_
