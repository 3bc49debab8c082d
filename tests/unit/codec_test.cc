#include "quant/codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "core/float16.h"
#include "support/expect_error.h"
#include "support/random.h"

namespace twilight {
namespace {

using test::Random;

enum class Rows { kNormal, kOffset, kZeroRange, kDenormal, kHuge, kTiny, kOneOutlier, kMixed };
constexpr Rows kAllRows[] = {Rows::kNormal, Rows::kOffset, Rows::kZeroRange,  Rows::kDenormal,
                             Rows::kHuge,   Rows::kTiny,   Rows::kOneOutlier, Rows::kMixed};

std::vector<float> make_rows(Rows kind, int num_rows, int head_dim, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> keys;
  for (int t = 0; t < num_rows; ++t) {
    const Rows row = kind == Rows::kMixed ? kAllRows[random.below(std::ssize(kAllRows) - 1)] : kind;
    const float level = random.normal() * 3.0F;
    for (int d = 0; d < head_dim; ++d) {
      float x = random.normal();
      switch (row) {
        case Rows::kOffset:
          x += 500.0F;
          break;
        case Rows::kZeroRange:
          x = level;
          break;
        case Rows::kDenormal:
          x *= 1e-41F;
          break;
        case Rows::kHuge:
          x *= 1e37F;
          break;
        case Rows::kTiny:
          x *= 1e-6F;  // scales are subnormal in f16
          break;
        case Rows::kOneOutlier:
          if (d == head_dim / 2) x = 60000.0F;
          break;
        case Rows::kNormal:
        case Rows::kMixed:
          break;
      }
      keys.push_back(x);
    }
  }
  return keys;
}

std::vector<std::byte> encode(int bits, int page_size, int head_dim,
                              const std::vector<float>& keys) {
  std::vector<std::byte> record(
      static_cast<std::size_t>(estimate_record_bytes({.key_bits = bits}, page_size, head_dim)),
      std::byte{0xff});
  encode_estimates(IndexLayout::kTokenLanes, bits, page_size, head_dim, keys, record.data());
  return record;
}

class EstimateCodec : public ::testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(EstimateCodec, ErrorStaysInsideTheBound) {
  const auto [bits, page_size, head_dim] = GetParam();
  for (const Rows kind : kAllRows) {
    const std::vector<float> keys = make_rows(kind, page_size, head_dim, 5);
    const std::vector<std::byte> record = encode(bits, page_size, head_dim, keys);
    std::vector<float> decoded(static_cast<std::size_t>(head_dim));
    for (int slot = 0; slot < page_size; ++slot) {
      const auto row = keys.begin() + std::ptrdiff_t{slot} * head_dim;
      const auto [lo, hi] = std::minmax_element(row, row + head_dim);
      const float bound = estimate_error_bound(bits, *lo, *hi);
      decode_estimate(IndexLayout::kTokenLanes, bits, page_size, head_dim, record.data(), slot,
                      decoded);
      for (int d = 0; d < head_dim; ++d) {
        const double error =
            std::abs(double{row[d]} - double{decoded[static_cast<std::size_t>(d)]});
        ASSERT_LE(error, bound) << "rows " << static_cast<int>(kind) << " slot " << slot << " d "
                                << d << " key " << row[d];
      }
      if (kind == Rows::kNormal) {  // the bound itself must be worth something
        const float step = (*hi - *lo) / static_cast<float>((1 << bits) - 1);
        ASSERT_LE(bound, 0.5F * step + 0.003F * (*hi - *lo) + 0.001F * std::abs(*lo));
      }
    }
  }
}

TEST_P(EstimateCodec, PaddedLanesAreZero) {
  const auto [bits, page_size, head_dim] = GetParam();
  const std::vector<float> keys = make_rows(Rows::kOffset, page_size, head_dim, 6);
  const std::vector<std::byte> record = encode(bits, page_size, head_dim, keys);
  const int lanes = estimate_tiles_per_page(page_size) * kEstimateTileTokens;
  for (int slot = page_size; slot < lanes; ++slot) {
    const std::byte* tile =
        record.data() + slot / kEstimateTileTokens * estimate_tile_bytes(bits, head_dim);
    const int t = slot % kEstimateTileTokens;
    for (std::int64_t byte = 0; byte < estimate_code_bytes(bits, head_dim); ++byte) {
      if (byte % 64 / 4 == t) {
        ASSERT_EQ(tile[byte], std::byte{0});
      }
    }
    for (const std::int64_t part : {0, 2 * kEstimateTileTokens}) {
      const std::byte* at = tile + estimate_code_bytes(bits, head_dim) + part + 2 * t;
      ASSERT_EQ(at[0], std::byte{0});
      ASSERT_EQ(at[1], std::byte{0});
    }
  }
}

TEST_P(EstimateCodec, SameKeysGiveTheSameBytes) {
  const auto [bits, page_size, head_dim] = GetParam();
  std::vector<float> keys = make_rows(Rows::kMixed, page_size, head_dim, 7);
  const std::vector<std::byte> first = encode(bits, page_size, head_dim, keys);
  EXPECT_EQ(first, encode(bits, page_size, head_dim, keys));
  // A token's codes depend on that token alone.
  if (page_size > 1) {
    std::vector<float> decoded(static_cast<std::size_t>(head_dim));
    std::vector<float> alone(static_cast<std::size_t>(head_dim));
    decode_estimate(IndexLayout::kTokenLanes, bits, page_size, head_dim, first.data(),
                    page_size - 1, decoded);
    const std::vector<float> last(keys.end() - head_dim, keys.end());
    const std::vector<std::byte> single = encode(bits, 1, head_dim, last);
    decode_estimate(IndexLayout::kTokenLanes, bits, 1, head_dim, single.data(), 0, alone);
    EXPECT_EQ(0, std::memcmp(decoded.data(), alone.data(), decoded.size() * sizeof(float)));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, EstimateCodec,
                         ::testing::Combine(::testing::Values(4, 8),
                                            ::testing::Values(1, 2, 15, 16, 17, 53, 61, 64, 256),
                                            ::testing::Values(8, 64, 80, 96, 128, 256)));

TEST(EstimateCodecBytes, LayoutIsTheDocumentedOne) {
  // Keys 0..15 by channel: scale 1, zero 0 and the code of channel d is d.
  std::vector<float> keys(16 * 16);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i % 16);
  const std::vector<std::byte> record = encode(4, 16, 16, keys);
  ASSERT_EQ(record.size(), 128U + 64U);
  for (int t = 0; t < 16; ++t) {
    for (int g = 0; g < 2; ++g) {
      for (int b = 0; b < 4; ++b) {
        const auto want = static_cast<std::byte>((8 * g + b) | ((8 * g + 4 + b) << 4));
        EXPECT_EQ(record[static_cast<std::size_t>(64 * g + 4 * t + b)], want);
      }
    }
    EXPECT_EQ(record[static_cast<std::size_t>(128 + 2 * t)], std::byte{0x00});
    EXPECT_EQ(record[static_cast<std::size_t>(128 + 2 * t + 1)], std::byte{0x3c});
    EXPECT_EQ(record[static_cast<std::size_t>(160 + 2 * t + 1)], std::byte{0x00});
  }
  // Keys 0 and 255 and a half-way value, which goes to the even code.
  const std::vector<float> wide = {0.0F, 255.0F, 2.5F, 3.5F};
  const std::vector<std::byte> record8 = encode(8, 1, 4, wide);
  EXPECT_EQ(record8[0], std::byte{0});
  EXPECT_EQ(record8[1], std::byte{255});
  EXPECT_EQ(record8[2], std::byte{2});
  EXPECT_EQ(record8[3], std::byte{4});
}

TEST(EstimateCodecBytes, SignOfZeroDoesNotMatter) {
  std::vector<float> keys = {0.0F, -0.0F, 0.0F, 1.0F, -0.0F, 0.5F, 0.0F, 1.0F};
  std::vector<float> turned = keys;
  std::rotate(turned.begin(), turned.begin() + 1, turned.begin() + 2);
  EXPECT_EQ(encode(4, 1, 8, keys), encode(4, 1, 8, turned));
}

TEST(EstimateCodecErrors, RejectsOtherBitsAndDims) {
  std::vector<float> keys(64);
  std::vector<std::byte> record(4096);
  test::expect_error(ErrorCode::kInvalidArgument, {"key_bits", "got 2"}, [&] {
    encode_estimates(IndexLayout::kTokenLanes, 2, 1, 64, keys, record.data());
  });
  test::expect_error(ErrorCode::kInvalidArgument, {"head_dim", "got 12"}, [&] {
    encode_estimates(IndexLayout::kTokenLanes, 4, 1, 12, keys, record.data());
  });
}

class QuestCodec : public ::testing::TestWithParam<std::tuple<int, int>> {};

TEST_P(QuestCodec, BoundsHoldAndAreTight) {
  const auto [page_size, head_dim] = GetParam();
  const auto dim = static_cast<std::size_t>(head_dim);
  for (const Rows kind : kAllRows) {
    const std::vector<float> keys = make_rows(kind, page_size, head_dim, 9);
    std::vector<std::byte> record(
        static_cast<std::size_t>(summary_record_bytes(SummaryKind::kQuestBf16, head_dim)));
    encode_summary(SummaryKind::kQuestBf16, page_size, head_dim, keys, record.data());
    std::vector<float> lo(dim);
    std::vector<float> hi(dim);
    decode_quest_summary(SummaryKind::kQuestBf16, head_dim, record.data(), lo, hi);
    for (std::size_t d = 0; d < dim; ++d) {
      float min = std::numeric_limits<float>::infinity();
      float max = -min;
      for (std::size_t t = 0; t < static_cast<std::size_t>(page_size); ++t) {
        min = std::min(min, keys[t * dim + d]);
        max = std::max(max, keys[t * dim + d]);
      }
      ASSERT_LE(lo[d], min);
      ASSERT_GE(hi[d], max);
      // One bf16 step: 2^-7 of the magnitude, or the smallest bf16 subnormal.
      ASSERT_GE(lo[d], min - std::abs(min) * 0x1p-7F - 0x1p-133F);
      ASSERT_LE(hi[d], max + std::abs(max) * 0x1p-7F + 0x1p-133F);
    }
  }
}

TEST_P(QuestCodec, Bf16KeysAreKeptExactly) {
  const auto [page_size, head_dim] = GetParam();
  std::vector<float> keys = make_rows(Rows::kOffset, page_size, head_dim, 10);
  for (float& x : keys) x = bf16_to_f32(f32_to_bf16(x));
  const auto dim = static_cast<std::size_t>(head_dim);
  std::vector<std::byte> record(
      static_cast<std::size_t>(summary_record_bytes(SummaryKind::kQuestBf16, head_dim)));
  encode_summary(SummaryKind::kQuestBf16, page_size, head_dim, keys, record.data());
  std::vector<float> lo(dim);
  std::vector<float> hi(dim);
  decode_quest_summary(SummaryKind::kQuestBf16, head_dim, record.data(), lo, hi);
  for (std::size_t d = 0; d < dim; ++d) {
    bool has_lo = false;
    bool has_hi = false;
    for (std::size_t t = 0; t < static_cast<std::size_t>(page_size); ++t) {
      has_lo = has_lo || keys[t * dim + d] == lo[d];
      has_hi = has_hi || keys[t * dim + d] == hi[d];
    }
    EXPECT_TRUE(has_lo && has_hi) << "channel " << d;
  }
}

TEST_P(QuestCodec, FourBitVectorsStayInsideTheBound) {
  const auto [page_size, head_dim] = GetParam();
  const auto dim = static_cast<std::size_t>(head_dim);
  for (const Rows kind : kAllRows) {
    const std::vector<float> keys = make_rows(kind, page_size, head_dim, 11);
    std::vector<std::byte> record(
        static_cast<std::size_t>(summary_record_bytes(SummaryKind::kQuest4, head_dim)),
        std::byte{0xff});
    encode_summary(SummaryKind::kQuest4, page_size, head_dim, keys, record.data());
    std::vector<float> min(dim, std::numeric_limits<float>::infinity());
    std::vector<float> max(dim, -std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < keys.size(); ++i) {
      min[i % dim] = std::min(min[i % dim], keys[i]);
      max[i % dim] = std::max(max[i % dim], keys[i]);
    }
    std::vector<float> lo(dim);
    std::vector<float> hi(dim);
    decode_quest_summary(SummaryKind::kQuest4, head_dim, record.data(), lo, hi);
    const auto [min_lo, min_hi] = std::minmax_element(min.begin(), min.end());
    const auto [max_lo, max_hi] = std::minmax_element(max.begin(), max.end());
    for (std::size_t d = 0; d < dim; ++d) {
      ASSERT_LE(std::abs(double{lo[d]} - double{min[d]}),
                estimate_error_bound(4, *min_lo, *min_hi));
      ASSERT_LE(std::abs(double{hi[d]} - double{max[d]}),
                estimate_error_bound(4, *max_lo, *max_hi));
    }
    for (std::size_t i = dim + 8; i < dim + 16; ++i) ASSERT_EQ(record[i], std::byte{0});
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, QuestCodec,
                         ::testing::Combine(::testing::Values(1, 2, 16, 53, 61, 256),
                                            ::testing::Values(8, 64, 80, 96, 128, 256)));

}  // namespace
}  // namespace twilight
