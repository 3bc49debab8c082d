#ifndef TWILIGHT_MODEL_TOKENIZER_BPE_TOKENIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_BPE_TOKENIZER_H_

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "model/tokenizer/tokenizer.h"

namespace twilight {

/// Tokenizer from the text of a tokenizer.json with a BPE model, byte-level or with byte fallback.
/// Post-processor templates, truncation and padding are ignored. `file` names it in messages.
/// Throws Error(kInvalidFile) for what is malformed, Error(kUnsupported) for what is not supported.
[[nodiscard]] std::unique_ptr<Tokenizer> load_bpe_tokenizer(
    std::string_view json, const std::string& file, std::optional<std::int32_t> bos_id = {});

/// The same from a document of that form, whose `model` is called `model_name` in messages. With
/// `gaps_part_words` as in BpeModel.
[[nodiscard]] std::unique_ptr<Tokenizer> make_bpe_tokenizer(const nlohmann::json& document,
                                                            const std::string& file,
                                                            const std::string& model_name,
                                                            bool gaps_part_words,
                                                            std::optional<std::int32_t> bos_id);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_BPE_TOKENIZER_H_
