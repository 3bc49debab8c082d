// Rotated planes and value means: bytes against examples worked by hand (the same as in
// docs/formats.md), round trips against derived bounds, and what records may depend on.
#include "quant/page_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "core/float16.h"
#include "quant/code_place.h"
#include "quant/nibbles.h"
#include "quant/rotation.h"
#include "support/random.h"

namespace twilight {
namespace {

using test::Random;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// The records of one page, each of its exact size, filled with `garbage` before.
struct Page {
  IndexFormat format;
  int page_size;
  int head_dim;
  std::vector<std::byte> summary, estimate, value_mean;
  std::vector<PageParams> params;

  Page(const IndexFormat& f, int p, int d, std::byte garbage = std::byte{0xff})
      : format(f), page_size(p), head_dim(d) {
    summary.assign(static_cast<std::size_t>(summary_record_bytes(f.summary, d)), garbage);
    estimate.assign(static_cast<std::size_t>(estimate_record_bytes(f, p, d)), garbage);
    if (f.value_bits != 0) value_mean.assign(static_cast<std::size_t>(nibble_bytes(d)), garbage);
    if (f.has_params()) params.resize(1);
    if (!params.empty()) std::memset(params.data(), static_cast<int>(garbage), sizeof(PageParams));
  }
  PageRecords records() {
    KeyIndexView view;
    view.format = format;
    view.summaries = summary.data();
    view.estimates = estimate.data();
    view.value_means = value_mean.data();
    view.params = reinterpret_cast<std::byte*>(params.data());
    return page_records(view, 0, 0, page_size, head_dim);
  }
  void encode(const std::vector<float>& keys, const std::vector<float>& values) {
    encode_page(format, page_size, head_dim, keys, values, records());
  }
  friend bool operator==(const Page& a, const Page& b) {
    return a.summary == b.summary && a.estimate == b.estimate && a.value_mean == b.value_mean &&
           a.params.size() == b.params.size() &&
           (a.params.empty() ||
            std::memcmp(a.params.data(), b.params.data(), sizeof(PageParams)) == 0);
  }
};

std::vector<std::byte> bytes(std::initializer_list<int> values) {
  std::vector<std::byte> out;
  for (const int value : values) out.push_back(static_cast<std::byte>(value));
  return out;
}

std::vector<std::byte> part(const std::vector<std::byte>& record, std::size_t begin,
                            std::size_t count) {
  const auto first = record.begin() + static_cast<std::ptrdiff_t>(begin);
  return {first, first + static_cast<std::ptrdiff_t>(count)};
}

double norm2(std::span<const float> x) {
  double sum = 0;
  for (const float value : x) sum += double{value} * double{value};
  return sum;
}

// --- bytes by hand ----------------------------------------------------------------------------

TEST(Nibbles, ExampleByHand) {
  // Scale 1; 0 and 1 lie half-way between codes and go to the even one.
  const std::vector<float> x = {-7.5F, 7.5F, 0.0F, 1.0F, -1.0F, 2.2F, 0.5F, -0.5F};
  std::vector<std::byte> codes(4, std::byte{0xff});
  EXPECT_EQ(encode_nibbles(x, codes.data()), 0x3c00);
  EXPECT_EQ(codes, bytes({0x60, 0xaf, 0x88, 0x78}));
  std::vector<float> decoded(8);
  decode_nibbles(codes.data(), 0x3c00, decoded);
  EXPECT_EQ(decoded, (std::vector<float>{-7.5F, 7.5F, 0.5F, 0.5F, -1.5F, 2.5F, 0.5F, -0.5F}));
}

TEST(Nibbles, ScaleZero) {
  for (const float tiny : {0.0F, 1e-8F, -1e-8F}) {
    const std::vector<float> x(8, tiny);
    std::vector<std::byte> codes(4);
    EXPECT_EQ(encode_nibbles(x, codes.data()), 0);
    EXPECT_EQ(codes, bytes({0x77, 0x77, 0x77, 0x77}));
    std::vector<float> decoded(8, 1.0F);
    decode_nibbles(codes.data(), 0, decoded);
    for (const float y : decoded) EXPECT_EQ(y, 0.0F);
  }
}

/// Two tokens of D = 16 with rotated keys m + r and m - r: the mean m lies on the 4-bit grid of
/// scale 1, the residual r on the 2-bit grid of scale 2.
struct Example {
  std::vector<float> m = {7.5F, -7.5F, 0.5F, -0.5F, 1.5F, -1.5F, 2.5F, -2.5F,
                          3.5F, -3.5F, 4.5F, -4.5F, 5.5F, -5.5F, 6.5F, -6.5F};
  std::vector<float> r = {3, 1, -1, 1, -1, -3, 1, 1, 1, -1, 3, -1, 1, 1, -1, -3};
  std::vector<float> keys, values;

  Example() {
    for (const float sign : {1.0F, -1.0F}) {
      std::vector<float> y(16);
      for (std::size_t d = 0; d < 16; ++d) y[d] = m[d] + sign * r[d];
      rotate_back(y);  // exact: multiples of 1 / 8 below 64
      keys.insert(keys.end(), y.begin(), y.end());
      for (std::size_t d = 0; d < 16; ++d) values.push_back(m[d] + sign);
    }
  }
};

const std::vector<std::byte> kMeanCodes = bytes({0x9f, 0x60, 0xa8, 0x57, 0xdb, 0x24, 0xec, 0x13});

TEST(PageBytes, OwnCentreExample) {
  const Example example;
  Page page({.summary = SummaryKind::kNone, .key_bits = 2, .value_bits = 4}, 2, 16);
  page.encode(example.keys, example.values);
  ASSERT_EQ(page.estimate.size(), 64U + 32U + 8U);
  EXPECT_EQ(part(page.estimate, 0, 8), bytes({0xa7, 0x92, 0x79, 0x1a, 0x58, 0x6d, 0x86, 0xe5}));
  for (std::size_t i = 8; i < 64; ++i) EXPECT_EQ(page.estimate[i], std::byte{0}) << i;
  EXPECT_EQ(part(page.estimate, 64, 4), bytes({0x00, 0x40, 0x00, 0x40}));  // scale 2, twice
  for (std::size_t i = 68; i < 96; ++i) EXPECT_EQ(page.estimate[i], std::byte{0}) << i;
  EXPECT_EQ(part(page.estimate, 96, 8), kMeanCodes);
  EXPECT_EQ(page.value_mean, kMeanCodes);
  const PageParams& params = page.params[0];
  EXPECT_EQ(params.centre_scale[0], 0x3c00);
  EXPECT_EQ(params.centre_scale[1] | params.centre_scale[2] | params.centre_scale[3], 0);
  EXPECT_EQ(params.variance, 0x4200);  // (12 * 1 + 4 * 9) / 16 = 3
  EXPECT_EQ(params.value_scale, 0x3c00);
  EXPECT_EQ(params.unused[0] | params.unused[1], 0);
  // Decoding gives m + r and m - r back.
  std::vector<float> key(16);
  for (int slot = 0; slot < 2; ++slot) {
    decode_estimated_key(page.format, 2, 16, page.records(), slot, key);
    for (std::size_t d = 0; d < 16; ++d) {
      EXPECT_EQ(key[d], example.m[d] + (slot == 0 ? example.r[d] : -example.r[d]));
    }
  }
}

TEST(PageBytes, CentroidExample) {
  const Example example;
  Page page({.summary = SummaryKind::kCentroid, .key_bits = 2, .value_bits = 0}, 2, 16);
  page.encode(example.keys, {});
  ASSERT_EQ(page.summary.size(), 16U);
  EXPECT_EQ(part(page.summary, 0, 8), kMeanCodes);
  // Both residuals are as long: the lower slot. Scale f16(3 / 7.5); 3, 1, -1, -3 are 15, 10, 5, 0.
  EXPECT_EQ(part(page.summary, 8, 8), bytes({0x5f, 0x0a, 0xa5, 0xaa, 0xaa, 0xa5, 0x5f, 0x05}));
  ASSERT_EQ(page.estimate.size(), 96U);
  EXPECT_EQ(part(page.estimate, 0, 8), bytes({0xa7, 0x92, 0x79, 0x1a, 0x58, 0x6d, 0x86, 0xe5}));
  const PageParams& params = page.params[0];
  EXPECT_EQ(params.centre_scale[0], 0x3c00);
  EXPECT_EQ(params.centre_scale[1], 0x3666);
  EXPECT_EQ(params.centre_scale[2] | params.centre_scale[3], 0);
  EXPECT_EQ(params.variance, 0x4200);
  EXPECT_EQ(params.value_scale | params.unused[0] | params.unused[1], 0);
}

TEST(PageBytes, SubCentroidsCoverRuns) {
  // Runs of ceil(5 / 4) = 2 tokens: 2, 2 and 1; the fourth covers none.
  constexpr int kDim = 16;
  std::vector<float> keys;
  for (const float level : {1.0F, 3.0F, -4.0F, -6.0F, 30.0F}) {
    std::vector<float> y(kDim, level);
    rotate_back(y);
    keys.insert(keys.end(), y.begin(), y.end());
  }
  Page page({.summary = SummaryKind::kSubCentroid, .key_bits = 0, .value_bits = 0}, 5, kDim);
  page.encode(keys, {});
  std::vector<float> mean(kDim);
  const float levels[] = {2.0F, -5.0F, 30.0F, 0.0F};
  for (int i = 0; i < 4; ++i) {
    decode_centre(page.records(), i, mean);
    // All channels are the largest: the top code; its scale rounds to f16.
    for (const float x : mean) EXPECT_NEAR(x, levels[i], std::abs(levels[i]) * 0x1p-11);
  }
  EXPECT_EQ(page.params[0].centre_scale[3], 0);
  EXPECT_EQ(part(page.summary, 24, 8), std::vector<std::byte>(8, std::byte{0x77}));
}

TEST(PageBytes, Sizes) {
  constexpr int kDim = 128;
  EXPECT_EQ(summary_record_bytes(SummaryKind::kCentroid, kDim), 128);
  EXPECT_EQ(summary_record_bytes(SummaryKind::kHalfCentroid, kDim), 128);
  EXPECT_EQ(summary_record_bytes(SummaryKind::kSubCentroid, kDim), 256);
  EXPECT_EQ(estimate_record_bytes({SummaryKind::kCentroid, 2}, 16, kDim), 544);
  EXPECT_EQ(estimate_record_bytes({SummaryKind::kNone, 2}, 16, kDim), 608);
  EXPECT_EQ(estimate_record_bytes({SummaryKind::kQuest4, 2}, 17, kDim), 2 * 544 + 64);
  EXPECT_EQ(estimate_record_bytes({SummaryKind::kSubCentroid, 4}, 16, kDim), 1088);
  EXPECT_EQ(nibble_bytes(kDim), 64);
}

// --- all formats ------------------------------------------------------------------------------

enum class Rows { kNormal, kOffset, kAllEqual, kDenormal, kHuge, kTiny, kOneOutlier, kSpecial };
constexpr Rows kFiniteRows[] = {Rows::kNormal,   Rows::kOffset, Rows::kAllEqual,
                                Rows::kDenormal, Rows::kTiny,   Rows::kOneOutlier};

std::vector<float> make_rows(Rows kind, int num_rows, int dim, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> rows;
  for (int t = 0; t < num_rows; ++t) {
    for (int d = 0; d < dim; ++d) {
      float x = random.normal();
      if (kind == Rows::kOffset) x += d % 7 == 0 ? 40.0F : 0.0F;
      if (kind == Rows::kAllEqual) x = 1.25F;
      if (kind == Rows::kDenormal) x *= 1e-41F;
      if (kind == Rows::kHuge) x *= 1e37F;
      if (kind == Rows::kTiny) x *= 1e-6F;  // scales are subnormal in f16
      if (kind == Rows::kOneOutlier && d == dim / 2 && t == num_rows / 2) x = 3000.0F;
      if (kind == Rows::kSpecial) {
        const std::int64_t which = random.below(24);
        if (which < 4) x = which == 0 ? kNan : which == 1 ? kInf : which == 2 ? -kInf : 3e38F;
      }
      rows.push_back(x);
    }
  }
  return rows;
}

constexpr IndexFormat kFormats[] = {
    {SummaryKind::kNone, 2, 4},     {SummaryKind::kQuestBf16, 2, 0},
    {SummaryKind::kCentroid, 2, 4}, {SummaryKind::kSubCentroid, 2, 4},
    {SummaryKind::kCentroid, 4, 0}, {SummaryKind::kSubCentroid, 8, 4},
    {SummaryKind::kCentroid, 0, 4}, {SummaryKind::kQuest4, 4, 4},
    {SummaryKind::kNone, 8, 4},     {SummaryKind::kHalfCentroid, 2, 4}};

class PageCodec : public ::testing::TestWithParam<std::tuple<int, int, int>> {
 protected:
  [[nodiscard]] IndexFormat format() const {
    return kFormats[static_cast<std::size_t>(std::get<0>(GetParam()))];
  }
  [[nodiscard]] int page_size() const { return std::get<1>(GetParam()); }
  [[nodiscard]] int dim() const { return std::get<2>(GetParam()); }
  [[nodiscard]] std::vector<float> keys(Rows kind) const {
    return make_rows(kind, page_size(), dim(), 31);
  }
  [[nodiscard]] std::vector<float> values(Rows kind) const {
    return make_rows(kind, page_size(), dim(), 32);
  }
  [[nodiscard]] std::vector<float> row(const std::vector<float>& rows, int slot) const {
    const auto first = rows.begin() + std::ptrdiff_t{slot} * dim();
    return {first, first + dim()};
  }
};

// What was there before, other planes and the order of bytes change nothing.
TEST_P(PageCodec, RecordsAreAFunctionOfThePage) {
  for (const Rows kind : {Rows::kNormal, Rows::kOneOutlier, Rows::kHuge, Rows::kSpecial}) {
    Page page(format(), page_size(), dim());
    page.encode(keys(kind), values(kind));
    Page again(format(), page_size(), dim(), std::byte{0x00});
    again.encode(keys(kind), values(kind));
    EXPECT_TRUE(page == again);

    Page other_values(format(), page_size(), dim());
    other_values.encode(keys(kind), values(Rows::kOffset));
    EXPECT_EQ(page.summary, other_values.summary);
    EXPECT_EQ(page.estimate, other_values.estimate);
    Page other_keys(format(), page_size(), dim());
    other_keys.encode(keys(Rows::kOffset), values(kind));
    EXPECT_EQ(page.value_mean, other_keys.value_mean);
    if (format().has_params()) {
      EXPECT_EQ(page.params[0].variance, other_values.params[0].variance);
      EXPECT_EQ(page.params[0].value_scale, other_keys.params[0].value_scale);
    }
  }
}

TEST_P(PageCodec, LayoutsHoldTheSameCodes) {
  IndexFormat mma = format();
  mma.layout = IndexLayout::kMma;
  if (dim() % 32 != 0) return;  // no fragments of 32 channels
  for (const Rows kind : {Rows::kNormal, Rows::kOneOutlier, Rows::kSpecial}) {
    Page lanes(format(), page_size(), dim());
    Page fragments(mma, page_size(), dim());
    lanes.encode(keys(kind), values(kind));
    fragments.encode(keys(kind), values(kind));
    EXPECT_EQ(lanes.summary, fragments.summary);
    EXPECT_EQ(lanes.value_mean, fragments.value_mean);
    ASSERT_EQ(lanes.estimate.size(), fragments.estimate.size());
    if (format().has_params()) {
      EXPECT_EQ(std::memcmp(lanes.params.data(), fragments.params.data(), sizeof(PageParams)), 0);
    }
    const int bits = format().key_bits;
    for (int tile = 0; tile < estimate_tiles_per_page(page_size()) && bits != 0; ++tile) {
      const std::byte* a = lanes.estimate.data() + tile * estimate_tile_bytes(bits, dim());
      const std::byte* b = fragments.estimate.data() + tile * estimate_tile_bytes(bits, dim());
      const std::int64_t end = estimate_code_bytes(bits, dim());
      for (int t = 0; t < 16; ++t) {
        for (int d = 0; d < dim(); ++d) {
          const CodePlace at = code_place(IndexLayout::kTokenLanes, bits, dim(), t, d);
          const CodePlace in = code_place(IndexLayout::kMma, bits, dim(), t, d);
          const unsigned mask = (1U << bits) - 1U;
          ASSERT_EQ(std::to_integer<unsigned>(a[at.byte]) >> at.shift & mask,
                    std::to_integer<unsigned>(b[in.byte]) >> in.shift & mask);
        }
        ASSERT_EQ(std::memcmp(a + end + scale_place(IndexLayout::kTokenLanes, bits, t),
                              b + end + scale_place(IndexLayout::kMma, bits, t), 2),
                  0);
        if (bits == 2) continue;
        ASSERT_EQ(std::memcmp(a + end + zero_place(IndexLayout::kTokenLanes, bits, t),
                              b + end + zero_place(IndexLayout::kMma, bits, t), 2),
                  0);
      }
    }
    if (format().own_centre()) {
      const auto centre = static_cast<std::size_t>(nibble_bytes(dim()));
      EXPECT_EQ(part(lanes.estimate, lanes.estimate.size() - centre, centre),
                part(fragments.estimate, lanes.estimate.size() - centre, centre));
    }
  }
}

TEST_P(PageCodec, PaddingIsZero) {
  const int bits = format().key_bits;
  if (bits != 2) return;  // no 2-bit records
  for (const Rows kind : {Rows::kOffset, Rows::kSpecial}) {
    Page page(format(), page_size(), dim());
    page.encode(keys(kind), values(kind));
    for (int slot = page_size(); slot < estimate_tiles_per_page(page_size()) * 16; ++slot) {
      const std::byte* tile = page.estimate.data() + slot / 16 * estimate_tile_bytes(2, dim());
      for (int d = 0; d < dim(); ++d) {
        const CodePlace at = code_place(format().layout, 2, dim(), slot % 16, d);
        ASSERT_EQ(std::to_integer<unsigned>(tile[at.byte]) >> at.shift & 3U, 0U);
      }
      const std::byte* scale =
          tile + estimate_code_bytes(2, dim()) + scale_place(format().layout, 2, slot % 16);
      ASSERT_EQ(scale[0] | scale[1], std::byte{0});
    }
  }
}

// Centres: half a step, or what the rounded scale leaves of the largest channel. Residuals: with
// codes u, no scale leaves less of r than s = r.u / u.u; the stored one is off by half a unit in
// the last place of f16. Both plus f32 rounding.
TEST_P(PageCodec, RoundTripsStayInsideTheBounds) {
  const IndexFormat f = format();
  const int tokens =
      centroid_tokens(f.own_centre() ? SummaryKind::kCentroid : f.summary, page_size());
  const int means = f.own_centre() ? 1 : num_centroids(f.summary);
  if (means == 0) return;  // nothing rotated
  for (const Rows kind : kFiniteRows) {
    SCOPED_TRACE(static_cast<int>(kind));
    const std::vector<float> plain = keys(kind);
    Page page(f, page_size(), dim());
    page.encode(plain, values(kind));
    const PageRecords records = page.records();
    std::vector<std::vector<float>> residuals;
    for (int i = 0; i < means && i * tokens < page_size(); ++i) {
      const int end = std::min(page_size(), (i + 1) * tokens);
      std::vector<float> centre(static_cast<std::size_t>(dim()));
      decode_centre(records, i, centre);
      std::vector<double> mean(centre.size(), 0.0);
      double largest = 0;
      double magnitude = 0;
      for (int slot = i * tokens; slot < end; ++slot) {
        std::vector<float> y = row(plain, slot);
        rotate(y);
        for (std::size_t d = 0; d < y.size(); ++d) {
          mean[d] += double{y[d]} / (end - i * tokens);
          magnitude = std::max(magnitude, std::abs(double{y[d]}));
          y[d] -= centre[d];
        }
        residuals.push_back(y);
      }
      for (const double x : mean) largest = std::max(largest, std::abs(x));
      const double scale = f16_to_f32(page.params[0].centre_scale[i]);
      const double bound =
          std::max(scale / 2, largest - 7.5 * scale) + (page_size() + 4) * 0x1p-23 * magnitude;
      for (std::size_t d = 0; d < centre.size(); ++d) {
        ASSERT_NEAR(centre[d], mean[d], bound) << "mean " << i << " channel " << d;
      }
    }

    double total = 0;
    double farthest = -1;
    for (const auto& r : residuals) {
      total += norm2(r);
      farthest = std::max(farthest, norm2(r));
    }
    const double variance = total / (double{1} * page_size() * dim());
    EXPECT_NEAR(f16_to_f32(page.params[0].variance), std::min(variance, 65504.0),
                variance * (0x1p-11 + 0x1p-14) + 0x1p-25);
    if (f.summary == SummaryKind::kCentroid) {
      std::vector<float> deviant(static_cast<std::size_t>(dim()));
      decode_deviant(records, deviant);
      const double scale = f16_to_f32(page.params[0].centre_scale[1]);
      bool matches = false;
      for (const auto& r : residuals) {
        if (norm2(r) < farthest * (1 - 0x1p-18)) continue;
        double largest = 0;
        for (const float x : r) largest = std::max(largest, std::abs(double{x}));
        const double bound = std::max(scale / 2, largest - 7.5 * scale) + largest * 0x1p-20;
        bool all = true;
        for (std::size_t d = 0; d < r.size(); ++d) {
          all = all && std::abs(double{r[d]} - double{deviant[d]}) <= bound;
        }
        matches = matches || all;
      }
      EXPECT_TRUE(matches) << "no key among the farthest has this residual";
    }
    if (f.key_bits != 2) continue;
    double error_sum = 0;
    std::vector<float> key(static_cast<std::size_t>(dim()));
    std::vector<float> centre(key.size());
    for (int slot = 0; slot < page_size(); ++slot) {
      const auto& r = residuals[static_cast<std::size_t>(slot)];
      decode_estimated_key(f, page_size(), dim(), records, slot, key);
      decode_centre(records, slot / tokens, centre);
      const std::byte* tile = records.estimate + slot / 16 * estimate_tile_bytes(2, dim());
      std::uint16_t scale_bits = 0;
      std::memcpy(&scale_bits,
                  tile + estimate_code_bytes(2, dim()) + scale_place(f.layout, 2, slot % 16), 2);
      const double scale = f16_to_f32(scale_bits);
      double matched = 0;
      double levels = 0;
      double error = 0;
      double rounding = 0;
      const double rms = std::sqrt(norm2(r) / dim());
      for (int d = 0; d < dim(); ++d) {
        const CodePlace at = code_place(f.layout, 2, dim(), slot % 16, d);
        const double u = (std::to_integer<unsigned>(tile[at.byte]) >> at.shift & 3U) - 1.5;
        const double x = r[static_cast<std::size_t>(d)];
        // The code is the nearer one of rms / 2 and 3 rms / 2 with the sign of x, where squares do
        // not vanish in f32.
        if (std::abs(std::abs(x) - rms) > rms * 0x1p-18 && rms > 0x1p-60) {
          ASSERT_EQ(std::abs(u), std::abs(x) > rms ? 1.5 : 0.5) << "slot " << slot << " d " << d;
        }
        ASSERT_EQ(u > 0, x >= 0) << "slot " << slot << " d " << d;
        matched += x * u;
        levels += u * u;
        const double left = x - (double{key[static_cast<std::size_t>(d)]} -
                                 double{centre[static_cast<std::size_t>(d)]});
        error += left * left;
        rounding += std::pow(double{key[static_cast<std::size_t>(d)]} * 0x1p-23 +
                                 double{centre[static_cast<std::size_t>(d)]} * 0x1p-23,
                             2);
      }
      const double best = matched / levels;
      ASSERT_NEAR(scale, std::min(best, 65504.0), best * (0x1p-11 + 0x1p-18) + 0x1p-25);
      const double off = scale - best;
      const double allowed = norm2(r) - matched * best + levels * off * off;
      ASSERT_LE(std::sqrt(error), std::sqrt(std::max(allowed, 0.0) * (1 + 0x1p-20)) +
                                      std::sqrt(rounding) + std::sqrt(norm2(r)) * 0x1p-20);
      error_sum += error;
    }
    // A normal variable at these four levels keeps all but 12 % of its variance. A single token is
    // its own mean: what is left of it is even.
    if (kind == Rows::kNormal && page_size() >= 16) {
      EXPECT_LT(error_sum, 0.14 * total);
    }
  }
}

TEST_P(PageCodec, ValueMeans) {
  if (format().value_bits == 0) return;  // no value means
  for (const Rows kind : kFiniteRows) {
    SCOPED_TRACE(static_cast<int>(kind));
    const std::vector<float> rows = values(kind);
    Page page(format(), page_size(), dim());
    page.encode(keys(Rows::kNormal), rows);
    std::vector<float> mean(static_cast<std::size_t>(dim()));
    decode_value_mean(page.records(), mean);
    const double scale = f16_to_f32(page.params[0].value_scale);
    double largest = 0;
    double magnitude = 0;
    std::vector<double> exact(mean.size(), 0.0);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      exact[i % mean.size()] += double{rows[i]} / page_size();
      magnitude = std::max(magnitude, std::abs(double{rows[i]}));
    }
    for (const double x : exact) largest = std::max(largest, std::abs(x));
    const double bound =
        std::max(scale / 2, largest - 7.5 * scale) + (page_size() + 4) * 0x1p-23 * magnitude;
    for (std::size_t d = 0; d < mean.size(); ++d) ASSERT_NEAR(mean[d], exact[d], bound);
  }
}

// Keys or values that are not finite, or overflow on the way, give some record.
TEST_P(PageCodec, SpecialValuesGiveSomeRecord) {
  for (const IndexLayout layout : {IndexLayout::kTokenLanes, IndexLayout::kMma}) {
    IndexFormat f = format();
    f.layout = layout;
    if (dim() % head_dim_unit(f) != 0) continue;
    const std::vector<float> all_nan(static_cast<std::size_t>(page_size() * dim()), kNan);
    const std::vector<float> all_inf(all_nan.size(), -kInf);
    for (const auto& rows : {keys(Rows::kSpecial), keys(Rows::kHuge), all_nan, all_inf}) {
      Page page(f, page_size(), dim());
      page.encode(rows, rows);
      std::vector<float> key(static_cast<std::size_t>(dim()));
      for (int slot = 0; slot < page_size() && f.key_bits != 0; ++slot) {
        decode_estimated_key(f, page_size(), dim(), page.records(), slot, key);
      }
      Page again(f, page_size(), dim(), std::byte{0x11});
      again.encode(rows, rows);
      EXPECT_TRUE(page == again);
    }
  }
}

// A centroid's mean and codes are those a record carries by itself.
TEST_P(PageCodec, OwnCentreIsTheCentroid) {
  if (format().summary != SummaryKind::kCentroid || format().key_bits != 2) {
    return;  // one format is enough
  }
  Page with(format(), page_size(), dim());
  Page alone({SummaryKind::kNone, 2, 4}, page_size(), dim());
  with.encode(keys(Rows::kNormal), values(Rows::kNormal));
  alone.encode(keys(Rows::kNormal), values(Rows::kNormal));
  EXPECT_EQ(with.estimate, part(alone.estimate, 0, with.estimate.size()));
  const auto centre = static_cast<std::size_t>(nibble_bytes(dim()));
  EXPECT_EQ(part(with.summary, 0, centre), part(alone.estimate, with.estimate.size(), centre));
  EXPECT_EQ(with.params[0].centre_scale[0], alone.params[0].centre_scale[0]);
  EXPECT_EQ(with.params[0].variance, alone.params[0].variance);
}

INSTANTIATE_TEST_SUITE_P(Shapes, PageCodec,
                         ::testing::Combine(::testing::Range(0,
                                                             static_cast<int>(std::size(kFormats))),
                                            ::testing::Values(1, 2, 3, 5, 15, 16, 17, 53, 64, 256),
                                            ::testing::Values(16, 64, 80, 96, 128, 256)));

}  // namespace
}  // namespace twilight
