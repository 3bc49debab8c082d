#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/check.h"
#include "model/tokenizer/regex.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

// Oniguruma counts six Latin-1 superscripts and fractions as word characters.
constexpr std::string_view kWordClass =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHexClass = "0-9a-fA-F";
// Escapes that mean the same in both flavours.
constexpr std::string_view kSameEscapes = "AZzGKRXbBdDnrtfae0123456789k";
constexpr std::string_view kMetaCharacters = "\\^$.[]|()?*+{}-&/\"'#%,:;<=>@_`~! ";

bool is_script(std::string_view name) {
  const std::string pattern = cat("\\p{sc:", name, '}');
  int code = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                       PCRE2_UTF | PCRE2_UCP, &code, &offset, nullptr);
  pcre2_code_free(compiled);
  return compiled != nullptr;
}

// PCRE2 reads a bare script name as script extensions and has no long category names.
std::string property(std::string_view name) {
  std::string plain;
  for (char c : name) {
    if (c != '_' && c != ' ' && c != '-') plain += static_cast<char>(std::tolower(c & 0x7F));
  }
  static constexpr std::pair<std::string_view, std::string_view> kNames[] = {
      {"letter", "L"},
      {"mark", "M"},
      {"number", "N"},
      {"punctuation", "P"},
      {"symbol", "S"},
      {"separator", "Z"},
      {"other", "C"},
      {"digit", "Nd"},
      {"alpha", "Alphabetic"},
      {"upper", "Uppercase"},
      {"lower", "Lowercase"},
      {"space", "White_Space"},
      {"decimalnumber", "Nd"},
      {"uppercaseletter", "Lu"},
      {"lowercaseletter", "Ll"},
      {"titlecaseletter", "Lt"},
      {"modifierletter", "Lm"},
      {"otherletter", "Lo"}};
  for (const auto& [from, to] : kNames) {
    if (plain == from) return std::string(to);
  }
  if (plain.size() > 2 && is_script(name)) return cat("sc:", name);
  return std::string(name);
}

class Translator {
 public:
  explicit Translator(std::string_view in) : in_(in) {}

  std::string run() {
    while (at_ < in_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] static void reject(std::string_view what) {
    throw std::invalid_argument(std::string(what));
  }
  [[nodiscard]] bool sees(std::string_view text) const { return in_.substr(at_).starts_with(text); }

  void step() {
    const char c = in_[at_];
    switch (c) {
      case '\\':
        atom_ = out_.size();
        escape(false);
        return;
      case '[':
        atom_ = out_.size();
        char_class();
        return;
      case '(':
        open_group();
        return;
      case ')':
        if (!groups_.empty()) {
          atom_ = groups_.back();
          groups_.pop_back();
        }
        break;
      case '{':
        interval();
        return;
      case '*':
      case '+':
      case '?':
      case '|':
        break;
      default:
        atom_ = out_.size();
        copy(utf8_length(c));
        return;
    }
    copy(1);
  }

  void copy(std::size_t count) {
    out_ += in_.substr(at_, count);
    at_ += count;
  }

  // Set of characters that stands alone, or inside a class.
  void set(std::string_view members, bool negated, bool in_class) {
    if (in_class && negated) reject("a negated \\W or \\H inside a character class");
    out_ += in_class ? std::string(members) : cat(negated ? "[^" : "[", members, ']');
  }

  void escape(bool in_class) {
    if (at_ + 1 >= in_.size()) reject("a backslash at the end");
    const char c = in_[at_ + 1];
    if (c == 'p' || c == 'P') return escape_property();
    if (c == 'u' || c == 'x') return escape_hex(c);
    if (c == 's' || c == 'S') {
      // PCRE2's \s has U+180E, which is no white space since Unicode 6.3.
      out_ += c == 's' ? "\\p{White_Space}" : "\\P{White_Space}";
    } else if (c == 'w' || c == 'W') {
      set(kWordClass, c == 'W', in_class);
    } else if (c == 'h' || c == 'H') {
      set(kHexClass, c == 'H', in_class);
    } else if (c == 'v') {
      out_ += "\\x0b";
    } else if (kSameEscapes.find(c) != std::string_view::npos ||
               kMetaCharacters.find(c) != std::string_view::npos) {
      out_ += in_.substr(at_, 2);
    } else if (static_cast<unsigned char>(c) >= 0x80) {
      at_ += 1;
      return copy(utf8_length(c));
    } else {
      reject(cat("the escape \\", c));
    }
    at_ += 2;
  }

  void escape_property() {
    const std::size_t close = in_.find('}', at_);
    if (at_ + 2 >= in_.size() || in_[at_ + 2] != '{' || close == std::string_view::npos) {
      reject("\\p without {name}");
    }
    std::string_view name = in_.substr(at_ + 3, close - at_ - 3);
    const bool caret = name.starts_with('^');
    if (caret) name.remove_prefix(1);
    out_ += cat('\\', in_[at_ + 1], caret ? "{^" : "{", property(name), '}');
    at_ = close + 1;
  }

  void escape_hex(char kind) {
    std::size_t from = at_ + 2;
    std::size_t digits = 0;
    const bool braces = kind == 'x' && from < in_.size() && in_[from] == '{';
    if (braces) ++from;
    const std::size_t most = braces ? 8 : kind == 'u' ? 4 : 2;
    const auto is_hex = [&](std::size_t i) {
      return i < in_.size() && std::isxdigit(static_cast<unsigned char>(in_[i])) != 0;
    };
    while (digits < most && is_hex(from + digits)) ++digits;
    const std::string hex(in_.substr(from, digits));
    if (digits == 0 || (kind == 'u' && digits != 4)) reject("a malformed \\x or \\u");
    if (braces && (from + digits >= in_.size() || in_[from + digits] != '}')) {
      reject("\\x{ without }");
    }
    if (kind == 'x' && !braces && digits == 2 && hex[0] >= '8') reject("\\x of a raw byte");
    out_ += cat("\\x{", hex, '}');
    at_ = from + digits + (braces ? 1 : 0);
  }

  void char_class() {
    copy(1);
    if (sees("^")) copy(1);
    if (sees("]")) reject("an empty character class");
    while (at_ < in_.size() && in_[at_] != ']') {
      if (sees("[:")) {
        const std::size_t close = in_.find(":]", at_);
        if (close == std::string_view::npos) reject("[: without :]");
        copy(close + 2 - at_);
      } else if (sees("[") || sees("&&")) {
        reject("a nested character class or &&");
      } else if (in_[at_] == '\\') {
        escape(true);
      } else {
        copy(utf8_length(in_[at_]));
      }
    }
    if (at_ == in_.size()) reject("[ without ]");
    copy(1);
  }

  void open_group() {
    if (sees("(*")) reject("a verb (*...)");
    groups_.push_back(out_.size());
    if (!sees("(?")) return copy(1);
    for (std::string_view plain : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!"}) {
      if (sees(plain)) return copy(plain.size());
    }
    if (sees("(?<")) {
      const std::size_t close = in_.find('>', at_);
      if (close == std::string_view::npos) reject("(?< without >");
      return copy(close + 1 - at_);
    }
    // Ruby's m lets the dot match a newline: PCRE2's s.
    std::size_t i = at_ + 2;
    std::string options;
    for (; i < in_.size() && (in_[i] == 'i' || in_[i] == 'm' || in_[i] == '-'); ++i) {
      options += in_[i] == 'm' ? 's' : in_[i];
    }
    if (i == in_.size() || (in_[i] != ':' && in_[i] != ')') || (in_[i] == ')' && at_ != 0)) {
      reject(
          "a group (?...) of another kind than : = ! > <= <! <name> i m, or options that do not "
          "open the pattern");
    }
    if (in_[i] == ')') groups_.pop_back();
    out_ += cat("(?", options, in_[i]);
    at_ = i + 1;
  }

  void interval() {
    const std::size_t close = in_.find('}', at_);
    const std::string_view body =
        close == std::string_view::npos ? "" : in_.substr(at_ + 1, close - at_ - 1);
    const bool well_formed = !body.empty() && body != "," &&
                             std::count(body.begin(), body.end(), ',') <= 1 &&
                             body.find_first_not_of("0123456789,") == std::string_view::npos;
    if (!well_formed) {
      atom_ = out_.size();
      out_ += "\\{";
      ++at_;
      return;
    }
    out_ += cat('{', body.front() == ',' ? "0" : "", body, '}');
    at_ = close + 1;
    if (sees("?") && body.find(',') == std::string_view::npos) reject("{n}?");
    if (sees("+")) {  // in Ruby a plain + over the interval, not a possessive one
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  std::string_view in_;
  std::string out_;
  std::size_t at_ = 0;
  std::size_t atom_ = 0;             // where in out_ the latest atom starts
  std::vector<std::size_t> groups_;  // where in out_ the open groups start
};

}  // namespace

std::string translate_pattern(std::string_view pattern) { return Translator(pattern).run(); }

}  // namespace twilight
