#ifndef TWILIGHT_MODEL_TOKENIZER_PRE_TOKENIZER_H_
#define TWILIGHT_MODEL_TOKENIZER_PRE_TOKENIZER_H_

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer/json_field.h"
#include "model/tokenizer/regex.h"

namespace twilight {

/// The words of a text: byte ranges of `text`, in order, none of them empty.
struct Words {
  struct Range {
    std::size_t begin;
    std::size_t end;
    bool opens_input;  ///< starts where the whole input starts
  };
  std::string text;
  std::vector<Range> ranges;
};

/// The `pre_tokenizer` of tokenizer.json: Split, ByteLevel, Digits, Metaspace and Sequences of
/// them. Immutable, safe to share between threads.
class PreTokenizer {
 public:
  PreTokenizer() = default;
  explicit PreTokenizer(const JsonField& field) { add(field, 0); }

  /// `text` is valid UTF-8; so is every word. `opens_input`: nothing of the input precedes it.
  [[nodiscard]] Words apply(std::string text, bool opens_input) const;

 private:
  enum class Kind { kSplit, kMapBytes, kPrefixSpace, kMetaspace };
  enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kNever, kFirst, kAlways };
  struct Step {
    Kind kind;
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;
    std::shared_ptr<const Regex> regex;
    std::string literal;  // of kSplit without regex; the replacement of kMetaspace
    Prepend prepend = Prepend::kNever;
  };
  struct Span {
    std::size_t begin;
    std::size_t end;
    bool match;
  };

  void add(const JsonField& field, int depth);
  void add_metaspace(const JsonField& field);
  static void split(const Step& step, Words& words);
  static void find_spans(const Step& step, std::string_view text, std::vector<Span>& spans);
  static void merge_spans(Behavior behavior, std::vector<Span>& spans);
  static void map_bytes(Words& words);
  static void prepend_space(Words& words);
  static void metaspace(const Step& step, Words& words);

  std::vector<Step> steps_;
};

/// Byte-level alphabet: one printable code point for each byte, all below U+0144.
[[nodiscard]] const std::array<char32_t, 256>& byte_level_alphabet();

/// Bytes of a token in the byte-level alphabet; the token itself if it has any other character.
[[nodiscard]] std::string byte_level_to_bytes(std::string_view token);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_PRE_TOKENIZER_H_
