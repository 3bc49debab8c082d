#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "model/tokenizer/bpe_tokenizer.h"
#include "twilight/error.h"

// Input: a tokenizer.json, whole. What loads must encode, decode and stream any text; whatever is
// thrown is twilight::Error.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  try {
    const auto tokenizer = twilight::load_bpe_tokenizer(input, "fuzz/tokenizer.json");
    const std::string text =
        std::string("Hello 123's \xC3\xA9 e\xCC\x81 \xE2\x96\x81 \xF0\x9F\x98\x80\xFF\r\n\t<s>") +
        std::string(input.substr(0, 256));
    const auto ids = tokenizer->encode(text, false);
    (void)tokenizer->decode(ids);
    twilight::StreamDecoder stream(*tokenizer);
    for (const std::int32_t id : std::span(ids).first(ids.size() < 64 ? ids.size() : 64)) {
      (void)stream.push(id);
    }
    (void)stream.flush();
  } catch (const twilight::Error&) {
    return 0;
  }
  return 0;
}
