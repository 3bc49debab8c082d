#include "quant/rotation.h"

#include <cmath>

namespace twilight {
namespace {

void hadamard(std::span<float> block) {
  const std::size_t size = block.size();
  for (std::size_t step = 1; step < size; step *= 2) {
    for (std::size_t i = 0; i < size; i += 2 * step) {
      for (std::size_t j = i; j < i + step; ++j) {
        const float a = block[j];
        const float b = block[j + step];
        block[j] = a + b;
        block[j + step] = a - b;
      }
    }
  }
  const auto norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (float& x : block) x *= norm;
}

template <typename Body>
void for_blocks(std::span<float> x, const Body& body) {
  const auto head_dim = static_cast<int>(x.size());
  for (int begin = 0; begin < head_dim;) {
    const int block = rotation_block(head_dim, begin);
    body(x.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(block)));
    begin += block;
  }
}

void flip_signs(std::span<float> x) {
  for (std::size_t d = 0; d < x.size(); ++d) x[d] *= rotation_sign(static_cast<int>(d));
}

}  // namespace

void rotate(std::span<float> x) {
  flip_signs(x);
  for_blocks(x, hadamard);
}

void rotate_back(std::span<float> x) {
  for_blocks(x, hadamard);
  flip_signs(x);
}

}  // namespace twilight
