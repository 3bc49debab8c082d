#ifndef TWILIGHT_MODEL_TOKENIZER_SCORE_TOKENIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_SCORE_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/tokenizer/tokenizer.h"

namespace twilight {

inline constexpr std::int32_t kMaxScoreTokens = 1 << 22;

/// Kinds of tokens, by their number in a GGUF file.
enum class PieceType : std::int32_t {
  kUndefined = 0,
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

/// Whether a text is searched for the token's spelling before it is cut into words.
[[nodiscard]] constexpr bool is_special_piece(PieceType type) {
  return type == PieceType::kUnknown || type == PieceType::kControl ||
         type == PieceType::kUserDefined;
}

struct ScorePiece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

struct ScoreOptions {
  bool space_prefix = true;  ///< a space goes before the text, and after each special token
  std::int32_t unknown = 0;  ///< for a byte that has no token
};

/// SentencePiece's BPE over a list of pieces, ids by position: spaces become U+2581, the pair of
/// neighbours whose joined piece has the highest score merges first, leftmost of equals, and what
/// is no piece becomes the byte tokens "<0x00>" to "<0xFF>". O(n log n). `file` names the model in
/// messages.
[[nodiscard]] std::unique_ptr<Tokenizer> make_score_tokenizer(std::vector<ScorePiece> pieces,
                                                              const ScoreOptions& options,
                                                              const std::string& file,
                                                              std::optional<std::int32_t> bos_id);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_SCORE_TOKENIZER_H_
