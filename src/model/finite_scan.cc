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

constexpr ExponentTest test_of(WeightType type) {
  switch (type) {
    case WeightType::kF16:
      return {0x7c007c007c007c00U, 0x0400040004000400U, 0x8000800080008000U};
    case WeightType::kBf16:
      return {0x7f807f807f807f80U, 0x0080008000800080U, 0x8000800080008000U};
    default:
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

// Where the f16 fields of a block lie; both the same where there is one.
struct Fields {
  int first;
  int second;
};

constexpr Fields fields_of(WeightType type) {
  switch (type) {
    case WeightType::kQ4_1:
    case WeightType::kQ5_1:
    case WeightType::kQ4_K:
    case WeightType::kQ5_K:
      return {0, 2};
    case WeightType::kQ2_K:
      return {80, 82};
    case WeightType::kQ3_K:
      return {108, 108};
    case WeightType::kQ6_K:
      return {208, 208};
    default:
      return {0, 0};
  }
}

bool blocks_non_finite(WeightType type, const std::byte* data, std::int64_t bytes) {
  const Fields fields = fields_of(type);
  const std::int64_t block = weight_block_bytes(type);
  const auto exponent = [](const std::byte* at) {
    std::uint16_t bits;
    std::memcpy(&bits, at, sizeof(bits));
    return bits & 0x7c00U;
  };
  bool found = false;
  for (std::int64_t at = 0; at < bytes; at += block) {
    found |= exponent(data + at + fields.first) == 0x7c00U;
    found |= exponent(data + at + fields.second) == 0x7c00U;
  }
  return found;
}

}  // namespace

bool has_non_finite(WeightType type, const std::byte* data, std::int64_t bytes) {
  if (is_quantised(type)) return blocks_non_finite(type, data, bytes);
  const ExponentTest test = test_of(type);
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

std::int64_t find_non_finite(WeightType type, const std::byte* data, std::int64_t bytes) {
  const int size = weight_block_bytes(type);
  for (std::int64_t i = 0; i < bytes / size; ++i) {
    if (has_non_finite(type, data + i * size, size)) return i * weight_block_length(type);
  }
  return -1;
}

}  // namespace twilight
