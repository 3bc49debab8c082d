#include "quant/weight_blocks.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "twilight/error.h"

namespace twilight {
namespace {

// Blocks and their weights as the gguf package decodes them; written by weights/make_blocks.py.
struct Golden {
  std::vector<std::byte> blocks;
  std::vector<float> weights;
};

std::map<WeightType, Golden> load_golden() {
  std::ifstream file(TWILIGHT_SOURCE_DIR "/tests/golden/weights/blocks.bin", std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::map<WeightType, Golden> all;
  std::size_t at = 0;
  const auto take = [&](void* to, std::size_t size) {
    ASSERT_LE(at + size, bytes.size());
    std::memcpy(to, bytes.data() + at, size);
    at += size;
  };
  while (at < bytes.size() && !::testing::Test::HasFatalFailure()) {
    std::uint32_t head[2];
    take(head, sizeof(head));
    const auto type = static_cast<WeightType>(head[0]);
    Golden golden;
    golden.blocks.resize(head[1] * static_cast<std::size_t>(weight_block_bytes(type)));
    golden.weights.resize(head[1] * static_cast<std::size_t>(weight_block_length(type)));
    take(golden.blocks.data(), golden.blocks.size());
    take(golden.weights.data(), golden.weights.size() * sizeof(float));
    all[type] = std::move(golden);
  }
  return all;
}

// Bit for bit: products are exact in f32, and the one sum rounds the same way everywhere.
TEST(WeightBlocks, EqualThoseOfTheGgufPackage) {
  const auto all = load_golden();
  EXPECT_EQ(all.size(), 13U);
  for (const auto& [type, golden] : all) {
    ASSERT_FALSE(golden.weights.empty());
    // One byte off: rows need no alignment.
    std::vector<std::byte> shifted(golden.blocks.size() + 1);
    std::memcpy(shifted.data() + 1, golden.blocks.data(), golden.blocks.size());
    std::vector<float> weights(golden.weights.size());
    dequantise_row(type, shifted.data() + 1, weights);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      ASSERT_EQ(weights[i], golden.weights[i]) << weight_type_name(type) << " weight " << i;
    }
  }
}

TEST(WeightBlocks, RowsAreWholeBlocks) {
  EXPECT_EQ(weight_row_bytes(WeightType::kQ4_1, 64), 40);
  EXPECT_EQ(weight_row_bytes(WeightType::kQ6_K, 512), 420);
  EXPECT_EQ(weight_row_bytes(WeightType::kBf16, 7), 14);
  std::byte row[64] = {};
  float values[33];
  EXPECT_THROW(dequantise_row(WeightType::kQ4_0, row, values), Error);
}

TEST(WeightBlocks, KnowTheirNumbers) {
  int known = 0;
  for (int value = -1; value < 64; ++value) {
    if (!is_weight_type(value)) continue;
    ++known;
    EXPECT_FALSE(weight_type_name(static_cast<WeightType>(value)).empty());
    EXPECT_GT(weight_block_bytes(static_cast<WeightType>(value)), 0);
  }
  EXPECT_EQ(known, 13);
}

}  // namespace
}  // namespace twilight
