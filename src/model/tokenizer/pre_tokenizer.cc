#include "model/tokenizer/pre_tokenizer.h"

#include <algorithm>

#include "core/check.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char32_t kAlphabetEnd = 0x144;

}  // namespace

const std::array<char32_t, 256>& byte_level_alphabet() {
  static const std::array<char32_t, 256> kAlphabet = [] {
    std::array<char32_t, 256> map{};
    char32_t next = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      map[byte] = printable ? byte : next++;
    }
    return map;
  }();
  return kAlphabet;
}

std::string byte_level_to_bytes(std::string_view token) {
  static const std::array<int, kAlphabetEnd> kBytes = [] {
    std::array<int, kAlphabetEnd> map{};
    map.fill(-1);
    for (unsigned byte = 0; byte < 256; ++byte) {
      map[byte_level_alphabet()[byte]] = static_cast<int>(byte);
    }
    return map;
  }();
  std::string bytes;
  for (std::size_t at = 0; at < token.size(); at += utf8_length(token[at])) {
    const char32_t point = decode_utf8(token.data() + at);
    if (point >= kAlphabetEnd || kBytes[point] < 0) return std::string(token);
    bytes += static_cast<char>(kBytes[point]);
  }
  return bytes;
}

void PreTokenizer::add(const JsonField& field, int depth) {
  const std::string& type = field.at("type").string();
  if (type == "Sequence") {
    if (depth == kMaxSequenceDepth) field.reject("Sequences nested at most 8 deep");
    const JsonField list = field.at("pretokenizers");
    for (std::size_t i = 0; i < list.array_size(); ++i) add(list.element(i), depth + 1);
  } else if (type == "Split") {
    Step step{Kind::kSplit};
    parse_pattern(field.at("pattern"), step.literal, step.regex);
    step.invert = field.boolean_or("invert", false);
    const JsonField behavior = field.at("behavior");
    static constexpr std::pair<std::string_view, Behavior> kBehaviors[] = {
        {"Isolated", Behavior::kIsolated},
        {"Removed", Behavior::kRemoved},
        {"MergedWithPrevious", Behavior::kMergedWithPrevious},
        {"MergedWithNext", Behavior::kMergedWithNext},
        {"Contiguous", Behavior::kContiguous}};
    const auto* found = std::find_if(std::begin(kBehaviors), std::end(kBehaviors),
                                     [&](const auto& b) { return b.first == behavior.string(); });
    if (found == std::end(kBehaviors)) {
      behavior.reject("Isolated, Removed, MergedWithPrevious, MergedWithNext, Contiguous");
    }
    step.behavior = found->second;
    steps_.push_back(std::move(step));
  } else if (type == "ByteLevel") {
    if (field.boolean_or("add_prefix_space", true)) steps_.push_back({Kind::kPrefixSpace});
    if (field.boolean_or("use_regex", true)) {
      Step step{Kind::kSplit};
      step.regex = std::make_shared<Regex>(kByteLevelPattern);
      steps_.push_back(std::move(step));
    }
    steps_.push_back({Kind::kMapBytes});
  } else if (type == "Digits") {
    Step step{Kind::kSplit};
    step.regex = std::make_shared<Regex>("\\p{N}");
    if (!field.boolean_or("individual_digits", false)) step.behavior = Behavior::kContiguous;
    steps_.push_back(std::move(step));
  } else if (type == "Metaspace") {
    add_metaspace(field);
  } else {
    field.at("type").unsupported("Split, ByteLevel, Digits, Metaspace, Sequence");
  }
}

void PreTokenizer::add_metaspace(const JsonField& field) {
  Step step{Kind::kMetaspace};
  step.literal = field.at("replacement").string();
  if (step.literal.empty() || utf8_length(step.literal[0]) != step.literal.size()) {
    field.at("replacement").reject("one character");
  }
  step.prepend = field.boolean_or("add_prefix_space", true) ? Prepend::kAlways : Prepend::kNever;
  if (field.has("prepend_scheme")) {
    const JsonField scheme = field.at("prepend_scheme");
    if (scheme.string() == "always") {
      step.prepend = Prepend::kAlways;
    } else if (scheme.string() == "first") {
      step.prepend = Prepend::kFirst;
    } else if (scheme.string() == "never") {
      step.prepend = Prepend::kNever;
    } else {
      scheme.reject("always, first, never");
    }
  }
  Step split{Kind::kSplit};
  split.literal = step.literal;
  split.behavior = Behavior::kMergedWithNext;
  steps_.push_back(std::move(step));
  if (field.boolean_or("split", true)) steps_.push_back(std::move(split));
}

void PreTokenizer::find_spans(const Step& step, std::string_view text, std::vector<Span>& spans) {
  spans.clear();
  std::size_t done = 0;
  const auto take = [&](std::size_t begin, std::size_t end) {
    if (begin != done) spans.push_back({done, begin, step.invert});
    spans.push_back({begin, end, !step.invert});
    done = end;
  };
  if (step.regex != nullptr) {
    Regex::Matches matches(*step.regex, text);
    for (std::size_t begin = 0, end = 0; matches.next(begin, end);) take(begin, end);
  } else {
    for (std::size_t hit = text.find(step.literal); hit != std::string_view::npos;
         hit = text.find(step.literal, done)) {
      take(hit, hit + step.literal.size());
    }
  }
  if (done != text.size()) spans.push_back({done, text.size(), step.invert});
}

void PreTokenizer::merge_spans(Behavior behavior, std::vector<Span>& spans) {
  if (behavior == Behavior::kIsolated) return;
  if (behavior == Behavior::kRemoved) {
    std::erase_if(spans, [](const Span& span) { return span.match; });
    return;
  }
  const bool backwards = behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(spans.begin(), spans.end());
  std::size_t kept = 0;
  bool previous_match = false;
  for (const Span span : spans) {
    const bool joins = behavior == Behavior::kContiguous ? span.match == previous_match
                                                         : span.match && !previous_match;
    previous_match = span.match;
    if (joins && kept > 0) {
      Span& last = spans[kept - 1];
      last.begin = std::min(last.begin, span.begin);
      last.end = std::max(last.end, span.end);
    } else {
      spans[kept++] = span;
    }
  }
  spans.resize(kept);
  if (backwards) std::reverse(spans.begin(), spans.end());
}

void PreTokenizer::split(const Step& step, Words& words) {
  std::vector<Words::Range> ranges;
  ranges.reserve(words.ranges.size());
  std::vector<Span> spans;
  for (const Words::Range& word : words.ranges) {
    find_spans(step, std::string_view(words.text).substr(word.begin, word.end - word.begin), spans);
    merge_spans(step.behavior, spans);
    for (const Span& span : spans) {
      if (span.begin == span.end) continue;
      ranges.push_back(
          {word.begin + span.begin, word.begin + span.end, word.opens_input && span.begin == 0});
    }
  }
  words.ranges = std::move(ranges);
}

void PreTokenizer::map_bytes(Words& words) {
  std::string text;
  text.reserve(words.text.size() * 2);
  for (Words::Range& word : words.ranges) {
    const std::size_t begin = text.size();
    for (std::size_t at = word.begin; at < word.end; ++at) {
      append_utf8(byte_level_alphabet()[static_cast<unsigned char>(words.text[at])], text);
    }
    word.begin = begin;
    word.end = text.size();
  }
  words.text = std::move(text);
}

void PreTokenizer::prepend_space(Words& words) {
  std::string text;
  text.reserve(words.text.size() + words.ranges.size());
  for (Words::Range& word : words.ranges) {
    const std::size_t begin = text.size();
    if (words.text[word.begin] != ' ') text += ' ';
    text.append(words.text, word.begin, word.end - word.begin);
    word.begin = begin;
    word.end = text.size();
  }
  words.text = std::move(text);
}

void PreTokenizer::metaspace(const Step& step, Words& words) {
  std::string text;
  text.reserve(words.text.size() * 2);
  for (Words::Range& word : words.ranges) {
    const std::string replaced = replace_all(
        std::string_view(words.text).substr(word.begin, word.end - word.begin), " ", step.literal);
    const bool prepend =
        step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && word.opens_input);
    word.begin = text.size();
    if (prepend && !replaced.starts_with(step.literal)) text += step.literal;
    text += replaced;
    word.end = text.size();
  }
  words.text = std::move(text);
}

Words PreTokenizer::apply(std::string text, bool opens_input) const {
  Words words{std::move(text), {}};
  if (words.text.empty()) return words;
  words.ranges.push_back({0, words.text.size(), opens_input});
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kSplit:
        split(step, words);
        break;
      case Kind::kMapBytes:
        map_bytes(words);
        break;
      case Kind::kPrefixSpace:
        prepend_space(words);
        break;
      case Kind::kMetaspace:
        metaspace(step, words);
        break;
    }
  }
  return words;
}

}  // namespace twilight
