#include "load_plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include "twilight/error.h"

namespace twilight::app {
namespace {

constexpr std::int32_t kMostTokens = 1 << 27;

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, what);
}

}  // namespace

Lengths Lengths::parse(const std::string& option, std::string_view text) {
  Lengths lengths;
  lengths.text_ = text;
  lengths.range_ = text.find(':') != std::string_view::npos;
  const auto wrong = [&] {
    refuse("[" + option + "] tokens, got '" + std::string(text) +
           "', accepted a number from 1, a range LOW:HIGH or a list A,B,C");
  };
  const char separator = lengths.range_ ? ':' : ',';
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    const std::string_view part = text.substr(begin, end - begin);
    std::int32_t value = 0;
    const auto [stop, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    if (error != std::errc() || stop != part.data() + part.size() || value < 1 ||
        value > kMostTokens) {
      wrong();
    }
    lengths.values_.push_back(value);
    begin = end + 1;
  }
  const auto& values = lengths.values_;
  if (lengths.range_ && (values.size() != 2 || values[0] > values[1])) wrong();
  return lengths;
}

std::int32_t Lengths::draw(double unit) const {
  if (!range_) {
    const auto at = static_cast<std::size_t>(unit * static_cast<double>(values_.size()));
    return values_[std::min(at, values_.size() - 1)];
  }
  const double low = std::log(values_[0]);
  const double high = std::log(values_[1] + 1.0);
  const auto tokens = static_cast<std::int32_t>(std::exp(low + unit * (high - low)));
  return std::clamp(tokens, values_[0], values_[1]);
}

std::int32_t Lengths::smallest() const { return *std::min_element(values_.begin(), values_.end()); }
std::int32_t Lengths::largest() const { return *std::max_element(values_.begin(), values_.end()); }

LoadSource::LoadSource(LoadShape shape) : shape_(std::move(shape)), random_(shape_.seed) {
  const Lengths& prompt = shape_.prompt;
  const std::int32_t longest = prompt.is_range() ? prompt.smallest() : prompt.largest();
  if (std::int64_t{longest} + shape_.output.largest() > shape_.context) {
    refuse("[bench] prompt and output, got " + std::to_string(longest) + " + " +
           std::to_string(shape_.output.largest()) + " tokens, accepted up to the server's " +
           std::to_string(shape_.context) + " together");
  }
}

// The engine is the same everywhere, the distributions of the standard library are not.
double LoadSource::unit() { return static_cast<double>(random_() >> 11U) * 0x1p-53; }

LoadRequest LoadSource::next() {
  LoadRequest request;
  request.index = index_++;
  const double gap = unit();
  if (shape_.rate > 0) clock_ += -std::log1p(-gap) / shape_.rate;
  request.at = clock_;
  request.prompt_tokens = shape_.prompt.draw(unit());
  request.output_tokens = shape_.output.draw(unit());
  request.prompt_tokens = std::min(request.prompt_tokens, shape_.context - request.output_tokens);
  request.place = unit();
  if (shape_.documents > 0) {
    request.place = std::floor(request.place * shape_.documents) / shape_.documents;
  }
  return request;
}

LoadText::LoadText(std::vector<std::int32_t> text, std::vector<std::int32_t> first)
    : text_(std::move(text)), first_(std::move(first)) {
  if (text_.empty()) refuse("[bench] text, got no tokens, accepted at least one");
}

std::vector<std::int32_t> LoadText::prompt(const LoadRequest& request,
                                           const std::vector<std::int32_t>& mark) const {
  const auto wanted = static_cast<std::size_t>(request.prompt_tokens);
  std::vector<std::int32_t> prompt = first_;
  prompt.insert(prompt.end(), mark.begin(), mark.end());
  prompt.reserve(std::max(wanted, prompt.size()));
  auto at = static_cast<std::size_t>(request.place * static_cast<double>(text_.size()));
  while (prompt.size() < wanted) {
    const std::size_t count = std::min(wanted - prompt.size(), text_.size() - at);
    const auto begin = text_.begin() + static_cast<std::ptrdiff_t>(at);
    prompt.insert(prompt.end(), begin, begin + static_cast<std::ptrdiff_t>(count));
    at = 0;
  }
  prompt.resize(wanted);
  return prompt;
}

}  // namespace twilight::app
