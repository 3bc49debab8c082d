#ifndef TWILIGHT_TESTS_SUPPORT_RANDOM_H_
#define TWILIGHT_TESTS_SUPPORT_RANDOM_H_

#include <cstddef>
#include <cstdint>
#include <vector>

/// Portable random numbers: integer hashing alone, so a seed means the same numbers everywhere.
namespace twilight::test {

/// A well-mixed function of its arguments (splitmix64 finaliser).
[[nodiscard]] constexpr std::uint64_t hash64(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15ULL + index + 0x632be59bd9b4e019ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// [0, 1) in steps of 2^-24.
[[nodiscard]] constexpr float uniform_from_bits(std::uint64_t bits) {
  return static_cast<float>(bits >> 40) * 0x1p-24F;
}

/// Mean 0, variance 1, within +-3.47: the sum of four 16-bit uniforms, exact in f32 up to the
/// final product.
[[nodiscard]] constexpr float normal_from_bits(std::uint64_t bits) {
  std::int32_t sum = -2 * 65535;
  for (int i = 0; i < 4; ++i) sum += static_cast<std::int32_t>((bits >> (16 * i)) & 0xffffU);
  return static_cast<float>(sum) * (1.7320508F / 65536.0F);
}

/// Stateful stream over `hash64`.
class Random {
 public:
  explicit constexpr Random(std::uint64_t seed) : seed_(seed) {}

  constexpr std::uint64_t next() { return hash64(seed_, counter_++); }
  constexpr float uniform() { return uniform_from_bits(next()); }
  constexpr float uniform(float lo, float hi) { return lo + (hi - lo) * uniform(); }
  constexpr float normal() { return normal_from_bits(next()); }
  /// Uniform in [0, n), n >= 1.
  constexpr std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>((next() >> 1) % static_cast<std::uint64_t>(n));
  }

 private:
  std::uint64_t seed_;
  std::uint64_t counter_ = 0;
};

/// `count` normal numbers times `size`.
[[nodiscard]] inline std::vector<float> normals(std::uint64_t seed, std::int64_t count,
                                                float size = 1.0F) {
  Random random(seed);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& value : out) value = size * random.normal();
  return out;
}

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_RANDOM_H_
