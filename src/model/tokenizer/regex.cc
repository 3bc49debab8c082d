#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/tokenizer/regex.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "core/check.h"
#include "model/tokenizer/utf8.h"

namespace twilight {
namespace {

// A linear pattern backtracks over at most a few steps per byte; the floor is PCRE2's own default.
constexpr std::size_t kMatchLimitFloor = 10'000'000;
constexpr std::uint32_t kHeapLimitKib = 512 * 1024;

std::string message(int code) {
  std::array<unsigned char, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

void Regex::Free::operator()(pcre2_code* code) const { pcre2_code_free(code); }
void Regex::Matches::Free::operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
void Regex::Matches::Free::operator()(pcre2_match_context* context) const {
  pcre2_match_context_free(context);
}

Regex::Regex(std::string_view pattern) {
  const std::string translated = translate_pattern(pattern);
  int code = 0;
  PCRE2_SIZE offset = 0;
  code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                            &code, &offset, nullptr));
  if (code_ == nullptr) throw std::invalid_argument(message(code));
  // Without JIT support this fails and matching is interpreted, with the same results.
  (void)pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
}

Regex::Matches::Matches(const Regex& regex, std::string_view text)
    : regex_(&regex),
      text_(text),
      data_(pcre2_match_data_create(1, nullptr)),
      context_(pcre2_match_context_create(nullptr)) {
  if (data_ == nullptr || context_ == nullptr) {
    fail(ErrorCode::kOutOfMemory, "tokenizer", "no memory to match a pattern");
  }
  const std::size_t limit = std::max(kMatchLimitFloor, 16 * text.size());
  pcre2_set_match_limit(context_.get(),
                        static_cast<std::uint32_t>(std::min<std::size_t>(limit, 0xFFFFFFFF)));
  pcre2_set_heap_limit(context_.get(), kHeapLimitKib);
}

bool Regex::Matches::next(std::size_t& begin, std::size_t& end) {
  while (from_ <= text_.size()) {
    const auto match = [&](std::uint32_t options) {
      return pcre2_match(regex_->code_.get(), reinterpret_cast<PCRE2_SPTR>(text_.data()),
                         text_.size(), from_, PCRE2_NO_UTF_CHECK | options, data_.get(),
                         context_.get());
    };
    int code = match(0);
    if (code == PCRE2_ERROR_JIT_STACKLIMIT) code = match(PCRE2_NO_JIT);
    if (code == PCRE2_ERROR_NOMATCH) return false;
    // 0 means that only the whole match fitted into the match data, which is all that is read.
    if (code < 0) {
      fail(ErrorCode::kInvalidFile, "tokenizer", "pre-tokeniser pattern failed on a text of ",
           text_.size(), " bytes: ", message(code));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data_.get());
    begin = span[0];
    end = span[1];
    if (begin < from_ || begin > end) {
      fail(ErrorCode::kInvalidFile, "tokenizer", "pre-tokeniser pattern moves its own start back");
    }
    if (begin == end && end == last_end_) {
      from_ += from_ < text_.size() ? utf8_length(text_[from_]) : 1;
      continue;
    }
    from_ = end;
    last_end_ = end;
    return true;
  }
  return false;
}

}  // namespace twilight
