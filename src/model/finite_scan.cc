#include "model/finite_scan.h"

#include <algorithm>
#include <cstring>

namespace twilight {
namespace {

// A value is NaN or infinite when its exponent bits are all ones. Adding one unit of the exponent
// to the exponent bits alone then carries into the sign's place, and into no neighbour, so whole
// 64-bit words are tested at once.
struct ExponentTest {
  std::uint64_t mask;   // exponent bits of every element in a word
  std::uint64_t unit;   // lowest exponent bit of each
  std::uint64_t carry;  // sign bit of each
};

constexpr ExponentTest test_of(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {0x7c007c007c007c00U, 0x0400040004000400U, 0x8000800080008000U};
    case DType::kBf16:
      return {0x7f807f807f807f80U, 0x0080008000800080U, 0x8000800080008000U};
    case DType::kF32:
      break;
  }
  return {0x7f8000007f800000U, 0x0080000000800000U, 0x8000000080000000U};
}

// Words between two looks at the result: 32 KiB, so that a bad value ends a long scan early.
constexpr std::int64_t kBlockWords = 4096;

std::uint64_t carries(const ExponentTest& test, const std::byte* data, std::int64_t words) {
  std::uint64_t found = 0;
  for (std::int64_t i = 0; i < words; ++i) {
    std::uint64_t word;
    std::memcpy(&word, data + i * 8, sizeof(word));
    found |= (word & test.mask) + test.unit;
  }
  return found & test.carry;
}

}  // namespace

bool has_non_finite(DType dtype, const std::byte* data, std::int64_t bytes) {
  const ExponentTest test = test_of(dtype);
  std::int64_t left = bytes / 8;
  while (left > 0) {
    const std::int64_t words = std::min(left, kBlockWords);
    if (carries(test, data, words) != 0) return true;
    data += words * 8;
    left -= words;
  }
  if (bytes % 8 == 0) return false;
  // The rest of a word is filled with zeros, which are finite.
  std::byte rest[8] = {};
  std::memcpy(rest, data, static_cast<std::size_t>(bytes % 8));
  return carries(test, rest, 1) != 0;
}

std::int64_t find_non_finite(DType dtype, const std::byte* data, std::int64_t bytes) {
  const int size = dtype_bytes(dtype);
  for (std::int64_t i = 0; i < bytes / size; ++i) {
    if (has_non_finite(dtype, data + i * size, size)) return i;
  }
  return -1;
}

}  // namespace twilight
