#ifndef TWILIGHT_TESTS_SUPPORT_SAME_BITS_H_
#define TWILIGHT_TESTS_SUPPORT_SAME_BITS_H_

#include <cstring>
#include <span>

namespace twilight::test {

/// Bit for bit: NaN equals itself, -0 is not 0.
[[nodiscard]] inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_SAME_BITS_H_
