#include "model/tokenizer/score_tokenizer.h"

#include <array>
#include <cstdio>
#include <queue>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581
constexpr std::int32_t kNone = -1;

class ScoreTokenizer final : public Tokenizer {
 public:
  ScoreTokenizer(std::vector<ScorePiece> pieces, const ScoreOptions& options,
                 std::optional<std::int32_t> bos_id)
      : Tokenizer(bos_id), pieces_(std::move(pieces)), options_(options) {
    ids_.reserve(pieces_.size());
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      if (pieces_[i].text.empty()) continue;
      ids_[pieces_[i].text] = static_cast<std::int32_t>(i);  // of equals the last
    }
    byte_of_.assign(pieces_.size(), kNone);
    for (int byte = 0; byte < 256; ++byte) {
      char name[8];
      (void)std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
      auto found = find(name);
      if (found != kNone && pieces_[index(found)].type == PieceType::kByte) {
        byte_of_[index(found)] = byte;
      } else if (found == kNone) {
        const char self = static_cast<char>(byte);
        found = find({&self, 1});
      }
      byte_ids_[index(byte)] = found == kNone ? options_.unknown : found;
    }
    for (const auto& [text, id] : ids_) {
      if (!is_special_piece(pieces_[index(id)].type)) continue;
      AddedToken token;
      token.content = std::string(text);
      token.id = id;
      special_.add(token, token.content);
    }
  }

  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const override {
    std::string bytes;
    bool first = true;
    for (const std::int32_t id : ids) {
      if (!has(id)) continue;
      std::string token = token_bytes(id);
      if (first && options_.space_prefix && byte_of_[index(id)] == kNone &&
          token.starts_with(' ')) {
        token.erase(0, 1);
      }
      first = false;
      bytes += token;
    }
    return replace_invalid_utf8(bytes);
  }

  [[nodiscard]] std::string kind() const override { return "SentencePiece"; }

  [[nodiscard]] int vocab_size() const override { return static_cast<int>(pieces_.size()); }

  [[nodiscard]] std::string token_bytes(std::int32_t id) const override {
    if (!has(id)) return {};
    const ScorePiece& piece = pieces_[index(id)];
    if (is_special_piece(piece.type)) return piece.text;
    if (byte_of_[index(id)] != kNone) return std::string(1, static_cast<char>(byte_of_[index(id)]));
    return replace_all(piece.text, kSpaceMark, " ");
  }

  [[nodiscard]] std::optional<std::int32_t> token_to_id(std::string_view token) const override {
    const std::int32_t id = find(token);
    if (id == kNone) return std::nullopt;
    return id;
  }

 protected:
  void encode_valid(std::string_view text, std::vector<std::int32_t>& ids) const override {
    bool after_special = true;
    for (const auto& part : special_.cut(text)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        after_special = true;
        continue;
      }
      std::string marked = options_.space_prefix && after_special ? " " : "";
      marked += part.text;
      encode_part(replace_all(marked, " ", kSpaceMark), ids);
      after_special = false;
    }
  }

 private:
  // A stretch of the text in a doubly linked list; bytes 0 once it is part of its left neighbour.
  struct Symbol {
    std::size_t begin;
    std::size_t bytes;
    std::int32_t previous;
    std::int32_t next;
  };
  struct Pair {
    float score;
    std::int32_t left;
    std::int32_t right;
    std::size_t bytes;
    bool operator<(const Pair& other) const {
      return score < other.score || (score == other.score && left > other.left);
    }
  };

  template <typename T>
  static std::size_t index(T value) {
    return static_cast<std::size_t>(value);
  }
  [[nodiscard]] bool has(std::int32_t id) const { return id >= 0 && index(id) < pieces_.size(); }
  [[nodiscard]] std::int32_t find(std::string_view text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? kNone : found->second;
  }

  void encode_part(std::string_view text, std::vector<std::int32_t>& ids) const {
    std::vector<Symbol> symbols;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t bytes = utf8_length(text[at]);
      const auto i = static_cast<std::int32_t>(symbols.size());
      symbols.push_back({at, bytes, i - 1, at + bytes == text.size() ? kNone : i + 1});
      at += bytes;
    }
    std::priority_queue<Pair> queue;
    const auto consider = [&](std::int32_t left, std::int32_t right) {
      if (left == kNone || right == kNone) return;
      const std::size_t bytes = symbols[index(left)].bytes + symbols[index(right)].bytes;
      const std::int32_t id = find(text.substr(symbols[index(left)].begin, bytes));
      if (id != kNone) queue.push({pieces_[index(id)].score, left, right, bytes});
    };
    for (std::size_t i = 1; i < symbols.size(); ++i) {
      consider(static_cast<std::int32_t>(i) - 1, static_cast<std::int32_t>(i));
    }
    while (!queue.empty()) {
      const Pair pair = queue.top();
      queue.pop();
      Symbol& left = symbols[index(pair.left)];
      Symbol& right = symbols[index(pair.right)];
      // Stale where either was merged since.
      if (left.bytes == 0 || right.bytes == 0 || left.bytes + right.bytes != pair.bytes) continue;
      left.bytes = pair.bytes;
      right.bytes = 0;
      left.next = right.next;
      if (right.next != kNone) symbols[index(right.next)].previous = pair.left;
      consider(left.previous, pair.left);
      consider(pair.left, left.next);
    }
    for (std::int32_t i = symbols.empty() ? kNone : 0; i != kNone; i = symbols[index(i)].next) {
      const std::string_view part = text.substr(symbols[index(i)].begin, symbols[index(i)].bytes);
      const std::int32_t id = find(part);
      if (id != kNone) {
        ids.push_back(id);
        continue;
      }
      for (const char c : part) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    }
  }

  std::vector<ScorePiece> pieces_;
  ScoreOptions options_;
  std::unordered_map<std::string_view, std::int32_t> ids_;  // keys point into pieces_
  std::array<std::int32_t, 256> byte_ids_{};
  std::vector<int> byte_of_;  // by id; kNone for tokens that are no byte
  AddedTokenMatcher special_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_score_tokenizer(std::vector<ScorePiece> pieces,
                                                const ScoreOptions& options,
                                                const std::string& file,
                                                std::optional<std::int32_t> bos_id) {
  if (pieces.empty() || options.unknown < 0 ||
      static_cast<std::size_t>(options.unknown) >= pieces.size()) {
    fail(ErrorCode::kInvalidFile, file, "pieces, got ", pieces.size(),
         ", accepted more than the unknown token's id, ", options.unknown);
  }
  return std::make_unique<ScoreTokenizer>(std::move(pieces), options, bos_id);
}

}  // namespace twilight
