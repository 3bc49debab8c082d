#include "model/tokenizer/tokenizer.h"

#include <filesystem>
#include <limits>

#include "core/check.h"
#include "core/mapped_file.h"
#include "model/tokenizer/bpe_tokenizer.h"
#include "model/tokenizer/sentencepiece_tokenizer.h"
#include "model/tokenizer/utf8.h"

namespace twilight {

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_bos) const {
  require(text.size() < static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
          "tokenizer", "text length, got ", text.size(), " bytes, accepted less than 2^31 - 1");
  std::vector<std::int32_t> ids;
  if (add_bos) {
    require(bos_id_.has_value(), "tokenizer",
            "add_bos, got true, accepted false: the model names no bos token");
    ids.push_back(*bos_id_);
  }
  if (is_valid_utf8(text)) {
    encode_valid(text, ids);
  } else {
    encode_valid(replace_invalid_utf8(text), ids);
  }
  return ids;
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_dir,
                                          std::optional<std::int32_t> bos_id) {
  const std::filesystem::path folder(model_dir);
  const std::string json = (folder / "tokenizer.json").string();
  const std::string model = (folder / "tokenizer.model").string();
  std::error_code ignored;
  if (std::filesystem::exists(json, ignored)) {
    return load_bpe_tokenizer(read_text_file(json), json, bos_id);
  }
  if (std::filesystem::exists(model, ignored)) {
    return load_sentencepiece_tokenizer(read_text_file(model), model, bos_id);
  }
  fail(ErrorCode::kNotFound, "tokenizer", "no tokenizer, got folder ", model_dir,
       ", accepted one with tokenizer.json or tokenizer.model");
}

std::string StreamDecoder::push(std::int32_t id) {
  held_ += tokenizer_->token_bytes(id);
  const std::size_t complete = held_.size() - incomplete_utf8_tail(held_);
  std::string text = replace_invalid_utf8(std::string_view(held_).substr(0, complete));
  held_.erase(0, complete);
  return text;
}

std::string StreamDecoder::flush() {
  std::string text = replace_invalid_utf8(held_);
  held_.clear();
  return text;
}

}  // namespace twilight
