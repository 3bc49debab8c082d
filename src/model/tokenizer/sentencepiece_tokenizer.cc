#include "model/tokenizer/sentencepiece_tokenizer.h"

#include <sentencepiece_processor.h>

#include <cstdlib>
#include <vector>

#include "core/check.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view bytes, const std::string& file,
                         std::optional<std::int32_t> bos_id)
      : Tokenizer(bos_id) {
    const auto status = processor_.LoadFromSerializedProto({bytes.data(), bytes.size()});
    if (!status.ok() || processor_.GetPieceSize() <= 0) {
      fail(ErrorCode::kInvalidFile, file, "malformed model, got ", bytes.size(),
           " bytes, accepted a SentencePiece tokenizer.model");
    }
    for (int id = 0; id < processor_.GetPieceSize(); ++id) {
      if (!is_symbol(id) || processor_.IdToPiece(id).empty()) continue;
      AddedToken token;
      token.content = processor_.IdToPiece(id);
      token.id = id;
      symbols_.add(token, token.content);
    }
    drops_first_space_ = measure_first_space();
  }

  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const override {
    std::string bytes;
    bool first = true;
    for (std::int32_t id : ids) {
      std::string token = token_bytes(id);
      if (first && drops_first_space_ && !is_byte(id) && token.starts_with(' ')) token.erase(0, 1);
      if (!token.empty() || has(id)) first = false;
      bytes += token;
    }
    return replace_invalid_utf8(bytes);
  }

  [[nodiscard]] std::string kind() const override { return "SentencePiece"; }

  [[nodiscard]] int vocab_size() const override { return processor_.GetPieceSize(); }

  [[nodiscard]] std::string token_bytes(std::int32_t id) const override {
    if (!has(id)) return {};
    const std::string& piece = processor_.IdToPiece(id);
    if (is_symbol(id)) return piece;
    if (is_byte(id)) {
      return std::string(1, static_cast<char>(std::strtol(piece.c_str() + 3, nullptr, 16)));
    }
    return replace_all(piece, kSpaceMark, " ");
  }

  [[nodiscard]] std::optional<std::int32_t> token_to_id(std::string_view token) const override {
    const int id = processor_.PieceToId({token.data(), token.size()});
    if (!has(id) || processor_.IdToPiece(id) != token) return std::nullopt;
    return id;
  }

 protected:
  void encode_valid(std::string_view text, std::vector<std::int32_t>& ids) const override {
    std::vector<int> piece_ids;
    for (const auto& part : symbols_.cut(text)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      const auto status = processor_.Encode({part.text.data(), part.text.size()}, &piece_ids);
      if (!status.ok()) {
        fail(ErrorCode::kInvalidArgument, "tokenizer", "SentencePiece cannot encode a text of ",
             part.text.size(), " bytes: ", status.error_message());
      }
      ids.insert(ids.end(), piece_ids.begin(), piece_ids.end());
    }
  }

 private:
  [[nodiscard]] bool has(std::int32_t id) const {
    return id >= 0 && id < processor_.GetPieceSize();
  }
  [[nodiscard]] bool is_byte(std::int32_t id) const {
    return has(id) && processor_.IsByte(id) && processor_.IdToPiece(id).size() == 6;
  }
  [[nodiscard]] bool is_symbol(int id) const {
    return processor_.IsControl(id) || processor_.IsUnknown(id);
  }

  // Whether the model puts a space before each text is not in the processor's interface; decoding a
  // piece that starts with one shows it.
  [[nodiscard]] bool measure_first_space() const {
    for (int id = 0; id < processor_.GetPieceSize(); ++id) {
      const std::string& piece = processor_.IdToPiece(id);
      if (is_symbol(id) || is_byte(id) || processor_.IsUnused(id) ||
          !piece.starts_with(kSpaceMark) || piece.size() == kSpaceMark.size()) {
        continue;
      }
      std::string decoded;
      if (!processor_.Decode(std::vector<int>{id}, &decoded).ok()) return false;
      return !decoded.starts_with(' ');
    }
    return false;
  }

  sentencepiece::SentencePieceProcessor processor_;
  AddedTokenMatcher symbols_;
  bool drops_first_space_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece_tokenizer(std::string_view bytes,
                                                        const std::string& file,
                                                        std::optional<std::int32_t> bos_id) {
  return std::make_unique<SentencePieceTokenizer>(bytes, file, bos_id);
}

}  // namespace twilight
