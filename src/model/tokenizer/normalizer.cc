#include "model/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "core/check.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

// A chain of Replace steps can grow a text exponentially; no real normaliser comes near this.
constexpr std::size_t kMaxGrowth = 64;
constexpr std::size_t kFreeBytes = std::size_t{1} << 20;

}  // namespace

void parse_pattern(const JsonField& field, std::string& literal,
                   std::shared_ptr<const Regex>& regex) {
  if (field.has("String")) {
    literal = field.at("String").string();
    if (literal.empty()) field.at("String").reject("a string that is not empty");
  } else if (field.has("Regex")) {
    const JsonField pattern = field.at("Regex");
    try {
      regex = std::make_shared<Regex>(pattern.string());
    } catch (const std::invalid_argument& error) {
      pattern.unsupported(cat("a pattern without this: ", error.what()));
    }
  } else {
    field.reject("{\"String\": text} or {\"Regex\": pattern}");
  }
}

void Normalizer::add(const JsonField& field, int depth) {
  const std::string& type = field.at("type").string();
  if (type == "Sequence") {
    if (depth == kMaxSequenceDepth) field.reject("Sequences nested at most 8 deep");
    const JsonField list = field.at("normalizers");
    for (std::size_t i = 0; i < list.array_size(); ++i) add(list.element(i), depth + 1);
  } else if (type == "NFC") {
    steps_.push_back({Kind::kForm, Form::kNfc});
  } else if (type == "NFD") {
    steps_.push_back({Kind::kForm, Form::kNfd});
  } else if (type == "NFKC") {
    steps_.push_back({Kind::kForm, Form::kNfkc});
  } else if (type == "NFKD") {
    steps_.push_back({Kind::kForm, Form::kNfkd});
  } else if (type == "Prepend") {
    Step step{Kind::kPrepend};
    step.to = field.at("prepend").string();
    steps_.push_back(std::move(step));
  } else if (type == "Replace") {
    Step step{Kind::kReplace};
    parse_pattern(field.at("pattern"), step.from, step.pattern);
    if (step.pattern != nullptr) step.kind = Kind::kReplacePattern;
    step.to = field.at("content").string();
    steps_.push_back(std::move(step));
  } else {
    field.at("type").unsupported("NFC, NFD, NFKC, NFKD, Prepend, Replace, Sequence");
  }
}

// Marks are sorted here because utf8proc's own pass is quadratic in the length of a run of them.
std::string Normalizer::to_form(std::string_view text, Form form) {
  // Everything below U+0300 is in NFC; such text has no lead byte from 0xCC on.
  const auto stable = [&](char c) {
    return static_cast<unsigned char>(c) < (form == Form::kNfc ? 0xCC : 0x80);
  };
  if (std::all_of(text.begin(), text.end(), stable)) return std::string(text);

  const bool compat = form == Form::kNfkc || form == Form::kNfkd;
  const bool compose = form == Form::kNfc || form == Form::kNfkc;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE |
                                                      (compat ? UTF8PROC_COMPAT : 0));
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  for (std::size_t at = 0; at < text.size(); at += utf8_length(text[at])) {
    // The longest decomposition of one character has 18 code points.
    utf8proc_int32_t parts[32];
    int boundary = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(decode_utf8(text.data() + at)), parts,
                                32, options, &boundary);
    if (count < 0 || count > 32) {
      fail(ErrorCode::kInternal, "tokenizer", "normalisation failed, got ", utf8proc_errmsg(count));
    }
    points.insert(points.end(), parts, parts + count);
  }
  const auto rank = [](utf8proc_int32_t point) {
    return utf8proc_get_property(point)->combining_class;
  };
  const auto is_mark = [&](utf8proc_int32_t point) { return rank(point) != 0; };
  for (auto run = std::find_if(points.begin(), points.end(), is_mark); run != points.end();) {
    const auto run_end = std::find_if_not(run, points.end(), is_mark);
    std::stable_sort(run, run_end, [&](auto a, auto b) { return rank(a) < rank(b); });
    run = std::find_if(run_end, points.end(), is_mark);
  }
  auto count = static_cast<utf8proc_ssize_t>(points.size());
  if (compose) {
    count = utf8proc_normalize_utf32(
        points.data(), count, static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
    if (count < 0) {
      fail(ErrorCode::kInternal, "tokenizer", "normalisation failed, got ", utf8proc_errmsg(count));
    }
  }
  std::string out;
  out.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < count; ++i) {
    append_utf8(static_cast<char32_t>(points[static_cast<std::size_t>(i)]), out);
  }
  return out;
}

std::string Normalizer::apply(std::string_view text) const {
  std::string out(text);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kForm:
        out = to_form(out, step.form);
        break;
      case Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.to);
        break;
      case Kind::kReplace:
        out = replace_all(out, step.from, step.to);
        break;
      case Kind::kReplacePattern: {
        std::string replaced;
        Regex::Matches matches(*step.pattern, out);
        std::size_t copied = 0;
        for (std::size_t begin = 0, end = 0; matches.next(begin, end); copied = end) {
          replaced.append(out, copied, begin - copied);
          replaced += step.to;
        }
        replaced.append(out, copied);
        out = std::move(replaced);
        break;
      }
    }
    if (out.size() > kMaxGrowth * text.size() + kFreeBytes) {
      fail(ErrorCode::kInvalidFile, "tokenizer", "text after normalising, got ", out.size(),
           " bytes from ", text.size(), ", accepted at most 64 times as many");
    }
  }
  return out;
}

}  // namespace twilight
