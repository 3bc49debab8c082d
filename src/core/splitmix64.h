#ifndef TWILIGHT_CORE_SPLITMIX64_H_
#define TWILIGHT_CORE_SPLITMIX64_H_

#include <cstdint>

/// SplitMix64 (Steele, Lea, Flood 2014): a fixed sequence for a seed, the same everywhere. Plain
/// arithmetic, usable in device code.
namespace twilight {

inline constexpr std::uint64_t kSplitMixStep = 0x9e3779b97f4a7c15ULL;

/// The output for a state: the generator's state is its seed plus one step a draw.
[[nodiscard]] constexpr std::uint64_t splitmix64(std::uint64_t state) {
  std::uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

}  // namespace twilight

#endif  // TWILIGHT_CORE_SPLITMIX64_H_
