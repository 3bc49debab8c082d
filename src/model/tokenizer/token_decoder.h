#ifndef TWILIGHT_MODEL_TOKENIZER_TOKEN_DECODER_H_
#define TWILIGHT_MODEL_TOKENIZER_TOKEN_DECODER_H_

#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer/json_field.h"

namespace twilight {

/// The `decoder` of tokenizer.json: ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip and
/// Sequences of them. Immutable, safe to share between threads.
class TokenDecoder {
 public:
  /// No decoder: tokens are joined by a space.
  TokenDecoder() = default;
  explicit TokenDecoder(const JsonField& field) { add(field, 0); }

  /// Text of a sequence of token spellings; valid UTF-8.
  [[nodiscard]] std::string decode(std::vector<std::string> tokens) const;
  /// Bytes of one token in the middle of a text, maybe part of a character.
  [[nodiscard]] std::string token_bytes(std::string_view token) const;
  /// Spelling that decodes to `text` itself: a byte-level decoder reads letters such as U+00E9 as
  /// bytes, also in added tokens, whose spelling is plain text.
  [[nodiscard]] std::string literal(std::string_view text) const;

 private:
  enum class Kind { kByteLevel, kMetaspace, kReplace, kByteFallback, kFuse, kStrip };
  struct Step {
    Kind kind;
    std::string from;
    std::string to;
    bool drops_first_space = false;  // kMetaspace
    std::size_t left = 0;            // kStrip: at most so many of `from` at each end
    std::size_t right = 0;
  };

  void add(const JsonField& field, int depth);
  static void run(const Step& step, std::vector<std::string>& tokens);

  std::vector<Step> steps_;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_TOKEN_DECODER_H_
