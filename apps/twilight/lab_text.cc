#include "lab_text.h"

#include <algorithm>
#include <cmath>

#include "twilight/error.h"

namespace twilight::app {
namespace {

// Fewer tokens of text than this hide nothing.
constexpr std::int64_t kLeastText = 16;

// `part` with the lines put in, in order of depth.
std::string woven(std::string_view part, const std::vector<HiddenLine>& lines) {
  std::string out;
  std::size_t from = 0;
  for (const HiddenLine& hidden : lines) {
    std::size_t cut =
        static_cast<std::size_t>(std::floor(hidden.depth * static_cast<double>(part.size())));
    if (cut < part.size()) {
      const std::size_t line = part.rfind('\n', cut);
      cut = line == std::string_view::npos ? 0 : line + 1;
    }
    cut = std::max(cut, from);
    out += part.substr(from, cut - from);
    from = cut;
    if (!out.empty() && out.back() != '\n') out += '\n';
    out += hidden.line;
    out += '\n';
  }
  out += part.substr(from);
  while (!out.empty() && (out.back() == '\n' || out.back() == ' ')) out.pop_back();
  return out;
}

}  // namespace

FillerText::FillerText(const Model& model, std::string name, std::string text)
    : model_(model), name_(std::move(name)), text_(std::move(text)) {
  if (text_.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "[eval] the text is empty, got " + name_ + ", accepted at least one character");
  }
  tokens_ = model_.encode(text_);
  const std::vector<std::int32_t> plain = model_.encode(text_, false);
  std::int64_t end = 0;
  ends_.reserve(plain.size());
  for (const std::int32_t token : plain) {
    end += static_cast<std::int64_t>(model_.token_bytes(token).size());
    ends_.push_back(std::min(end, static_cast<std::int64_t>(text_.size())));
  }
}

std::vector<std::int32_t> FillerText::fill(std::int64_t budget,
                                           std::vector<HiddenLine> lines) const {
  std::stable_sort(lines.begin(), lines.end(),
                   [](const HiddenLine& a, const HiddenLine& b) { return a.depth < b.depth; });
  std::int64_t overhead = 1;  // the begin token
  for (const HiddenLine& hidden : lines) {
    overhead += static_cast<std::int64_t>(model_.encode("\n" + hidden.line + "\n", false).size());
  }
  std::int64_t take = budget - overhead;
  if (take < kLeastText) {
    throw Error(ErrorCode::kInvalidArgument,
                "[eval] context, got room for " + std::to_string(budget) +
                    " tokens before the question, accepted at least " +
                    std::to_string(overhead + kLeastText) + ": take a larger --ctx");
  }
  if (take > static_cast<std::int64_t>(ends_.size())) {
    throw Error(ErrorCode::kInvalidArgument,
                "[eval] the text is too short, got " + std::to_string(ends_.size()) +
                    " tokens of " + name_ + ", accepted at least " + std::to_string(take));
  }
  // Cutting and joining can add tokens, so step back until the prompt fits.
  for (;;) {
    const auto length = static_cast<std::size_t>(ends_[static_cast<std::size_t>(take - 1)]);
    std::vector<std::int32_t> prompt =
        model_.encode(woven(std::string_view(text_).substr(0, length), lines));
    const std::int64_t excess = static_cast<std::int64_t>(prompt.size()) - budget;
    if (excess <= 0) return prompt;
    take -= excess;
    if (take < 1) {
      throw Error(ErrorCode::kInternal, "[eval] the hidden lines do not fit the context");
    }
  }
}

}  // namespace twilight::app
