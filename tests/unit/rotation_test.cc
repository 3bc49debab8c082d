// The rotation against its matrix, and where the codes of a tile lie.
#include "quant/rotation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <span>
#include <vector>

#include "quant/code_place.h"
#include "support/random.h"

namespace twilight {
namespace {

using test::Random;

double norm2(std::span<const float> x) {
  double sum = 0;
  for (const float value : x) sum += double{value} * double{value};
  return sum;
}

// --- rotation ---------------------------------------------------------------------------------

class Rotation : public ::testing::TestWithParam<int> {};

// Column by column against the matrix written out: R[i][j] = (-1)^popcount(i & j) sign(j) / sqrt(n)
// inside a block, 0 outside.
TEST_P(Rotation, IsTheDocumentedMatrix) {
  const int dim = GetParam();
  std::vector<int> block_begin;
  std::vector<int> block_size;
  for (int begin = 0; begin < dim;) {
    int size = 1;
    while (2 * size <= dim - begin) size *= 2;
    for (int i = 0; i < size; ++i) {
      block_begin.push_back(begin);
      block_size.push_back(size);
    }
    begin += size;
  }
  for (int j = 0; j < dim; ++j) {
    std::vector<float> x(static_cast<std::size_t>(dim), 0.0F);
    x[static_cast<std::size_t>(j)] = 1.0F;
    rotate(x);
    const int begin = block_begin[static_cast<std::size_t>(j)];
    const int size = block_size[static_cast<std::size_t>(j)];
    const auto norm = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
    for (int i = 0; i < dim; ++i) {
      float want = 0;
      if (i >= begin && i < begin + size) {
        const bool odd = __builtin_popcount(static_cast<unsigned>((i - begin) & (j - begin))) % 2;
        want = (odd ? -norm : norm) * rotation_sign(j);
      }
      ASSERT_EQ(x[static_cast<std::size_t>(i)], want) << i << ' ' << j;
    }
  }
}

TEST_P(Rotation, KeepsProductsAndUndoes) {
  const int dim = GetParam();
  Random random(21);
  std::vector<float> a, b;
  for (int d = 0; d < dim; ++d) {
    a.push_back(random.normal());
    b.push_back(random.normal());
  }
  double before = 0;
  for (std::size_t d = 0; d < a.size(); ++d) before += double{a[d]} * double{b[d]};
  std::vector<float> ra = a;
  std::vector<float> rb = b;
  rotate(ra);
  rotate(rb);
  double after = 0;
  for (std::size_t d = 0; d < a.size(); ++d) after += double{ra[d]} * double{rb[d]};
  // log2(D) + 2 roundings on each side, of numbers no larger than the vectors' norms.
  const double bound = 2 * (std::log2(dim) + 2) * 0x1p-24 * std::sqrt(norm2(a) * norm2(b)) * 2;
  EXPECT_NEAR(after, before, bound);
  rotate_back(ra);
  for (std::size_t d = 0; d < a.size(); ++d) {
    EXPECT_NEAR(ra[d], a[d], 4 * (std::log2(dim) + 2) * 0x1p-24 * std::sqrt(norm2(a)));
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, Rotation,
                         ::testing::Values(1, 8, 16, 48, 64, 80, 96, 128, 256, 512));

// Numbers whose sums round: the order of the butterflies shows in the bits.
TEST(RotationOrder, ButterfliesGoFromNearToFar) {
  const float x[4] = {1.0F, 0x1p-24F, 0x1p-24F, 3 * 0x1p-25F};
  std::vector<float> got(4);
  for (int d = 0; d < 4; ++d) got[static_cast<std::size_t>(d)] = x[d] * rotation_sign(d);
  rotate(got);  // the signs cancel
  volatile float s0 = x[0] + x[1];
  volatile float d0 = x[0] - x[1];
  volatile float s1 = x[2] + x[3];
  volatile float d1 = x[2] - x[3];
  EXPECT_EQ(got, (std::vector<float>{(s0 + s1) * 0.5F, (d0 + d1) * 0.5F, (s0 - s1) * 0.5F,
                                     (d0 - d1) * 0.5F}));
}

TEST(RotationOrder, SignsAreSplitMix64) {
  // Its first outputs from seed 0, published with the generator: e220a8397b1dcdaf,
  // 6e789e6aa1b965f4, 06c45d188009454f, f88bb8a8724c81ec.
  EXPECT_EQ(rotation_sign(0), -1.0F);
  EXPECT_EQ(rotation_sign(1), 1.0F);
  EXPECT_EQ(rotation_sign(2), 1.0F);
  EXPECT_EQ(rotation_sign(3), -1.0F);
}

// --- where codes lie --------------------------------------------------------------------------

TEST(CodePlaces, EveryCodeHasItsOwnBits) {
  for (const IndexLayout layout : {IndexLayout::kTokenLanes, IndexLayout::kMma}) {
    for (const int bits : {2, 4, 8}) {
      for (const int dim : {32, 64, 96, 128, 160, 192, 256, 512}) {
        std::set<std::int64_t> places;
        for (int t = 0; t < 16; ++t) {
          for (int d = 0; d < dim; ++d) {
            const CodePlace place = code_place(layout, bits, dim, t, d);
            ASSERT_TRUE(place.byte >= 0 && place.byte < estimate_code_bytes(bits, dim));
            ASSERT_TRUE(place.shift >= 0 && place.shift + bits <= 8 && place.shift % bits == 0);
            places.insert(8 * place.byte + place.shift);
          }
        }
        EXPECT_EQ(std::ssize(places), 16 * dim);
        std::set<int> parameters;
        for (int t = 0; t < 16; ++t) {
          parameters.insert(scale_place(layout, bits, t));
          if (bits > 2) parameters.insert(zero_place(layout, bits, t));
        }
        EXPECT_EQ(std::ssize(parameters), bits == 2 ? 16 : 32);
        EXPECT_EQ(*parameters.rbegin(), bits == 2 ? 30 : 62);
      }
    }
  }
}

// Matrix fragments from the side of the reader: a warp loads chunk after chunk, each lane its 16
// bytes or, in the last, what is left; the bytes of a lane in order must hold its channels.
TEST(CodePlaces, MmaLanesReadWhatTheInstructionWants) {
  for (const int dim : {32, 64, 96, 128, 160, 192, 256, 512}) {
    for (const int bits : {2, 4}) {
      const int lane_bytes = dim * bits / 16;
      std::int64_t chunk_begin = 0;
      for (int begin = 0; begin < lane_bytes; begin += 16) {
        const int width = std::min(16, lane_bytes - begin);
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = begin; i < begin + width; ++i) {
            for (int part_of_byte = 0; part_of_byte < 8 / bits; ++part_of_byte) {
              // 2 bits: tokens g, g + 8 of a channel, then of the one 4 further on.
              const int token = lane / 4 + 8 * (part_of_byte % 2);
              const int in_lane = bits == 4 ? i : i / 4 * 8 + i % 4 + 4 * (part_of_byte / 2);
              const CodePlace place =
                  code_place(IndexLayout::kMma, bits, dim, token, lane % 4 * (dim / 4) + in_lane);
              ASSERT_EQ(place.byte, chunk_begin + lane * width + i - begin);
              ASSERT_EQ(place.shift, bits * part_of_byte);
            }
          }
        }
        chunk_begin += 32 * width;
      }
    }
  }
}

}  // namespace
}  // namespace twilight
