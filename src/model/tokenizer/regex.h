#ifndef TWILIGHT_MODEL_TOKENIZER_REGEX_H_
#define TWILIGHT_MODEL_TOKENIZER_REGEX_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;

namespace twilight {

/// A pre-tokeniser pattern. It is written in the Ruby flavour of Oniguruma, which the reference
/// implementation runs, and is matched by PCRE2 after translation (`translate_pattern`). Immutable,
/// safe to share between threads.
class Regex {
 public:
  /// Throws std::invalid_argument with one line that says what is wrong with the pattern.
  explicit Regex(std::string_view pattern);

  /// Walks the matches in one text, left to right, not overlapping; an empty match right after the
  /// previous one is passed over. The text is valid UTF-8 and outlives the object.
  class Matches {
   public:
    Matches(const Regex& regex, std::string_view text);
    /// False at the end. Throws Error(kInvalidFile) where the pattern needs more steps or memory
    /// than allowed.
    bool next(std::size_t& begin, std::size_t& end);

   private:
    struct Free {
      void operator()(pcre2_real_match_data_8* data) const;
      void operator()(pcre2_real_match_context_8* context) const;
    };
    const Regex* regex_;
    std::string_view text_;
    std::unique_ptr<pcre2_real_match_data_8, Free> data_;
    std::unique_ptr<pcre2_real_match_context_8, Free> context_;
    std::size_t from_ = 0;
    std::size_t last_end_ = std::string_view::npos;
  };

 private:
  struct Free {
    void operator()(pcre2_real_code_8* code) const;
  };
  std::unique_ptr<pcre2_real_code_8, Free> code_;
};

/// Rewrites an Oniguruma (Ruby) pattern for PCRE2 with UTF, UCP and MULTILINE where the two differ:
/// \s \w \h \v \uHHHH, script names, (?m), {n,m}+, {,n}. Throws std::invalid_argument for
/// constructs whose meaning would silently change: nested classes, &&, options inside the pattern,
/// verbs.
[[nodiscard]] std::string translate_pattern(std::string_view pattern);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TOKENIZER_REGEX_H_
