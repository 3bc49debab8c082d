#include "heatmap.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <random>
#include <string>

#include "inspect_page.h"
#include "inspect_picture.h"
#include "layer_strip.h"
#include "markup.h"
#include "palette.h"

namespace twilight::app {
namespace {

// Layers of which the first `dense` are dense; kept counts spread evenly on a logarithmic axis.
InspectData sample(int layers, int dense, std::int32_t q_heads, std::int32_t kv_heads, int steps) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> unit(0, 1);
  InspectData data;
  data.model = "model";
  data.device = "device";
  data.policy = "paper";
  data.answer = "an answer";
  data.prompt_tokens = 16000;
  data.q_heads = q_heads;
  data.kv_heads = kv_heads;
  data.kept_mean = 500;
  data.mass_mean = 0.97;
  for (int step = 0; step < steps; ++step) data.step_tokens.emplace_back(" word");
  for (int i = 0; i < layers; ++i) {
    InspectLayer layer;
    for (int step = 0; step < steps; ++step) {
      layer.path.push_back(i < dense ? StepPath::kDenseLayer : StepPath::kSparse);
      layer.tokens.push_back(16001 + step);
      for (int h = 0; h < q_heads; ++h) {
        layer.kept.push_back(
            i < dense ? 16001 + step : static_cast<std::int32_t>(64 * std::exp2(6 * unit(random))));
        layer.estimated_mass.push_back(i < dense ? 1.0F : 0.9F + 0.1F * float(unit(random)));
      }
      for (int h = 0; h < kv_heads; ++h) {
        layer.attended.push_back(i < dense ? 16001 + step : 2000);
        layer.candidates.push_back(i < dense ? 16001 + step : 4096);
      }
    }
    data.layers.push_back(std::move(layer));
  }
  return data;
}

double kept_of(const InspectLayer& layer, std::size_t step, std::int32_t head) {
  return layer
      .kept[step * (layer.kept.size() / layer.path.size()) + static_cast<std::size_t>(head)];
}

std::string svg_of(const InspectData& data) { return draw_picture(data, {}).svg; }

// Whether Python's XML parser takes the text.
testing::AssertionResult well_formed(const std::string& text) {
  const std::string path = testing::TempDir() + "twilight_heatmap_test.xml";
  std::ofstream(path, std::ios::binary) << text;
  const std::string command =
      TWILIGHT_PYTHON " -c \"import sys, xml.etree.ElementTree as e; e.parse(sys.argv[1])\" '" +
      path + "'";
  if (std::system(command.c_str()) == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "kept in " << path;
}

int count_of(const std::string& text, const std::string& part) {
  int count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

TEST(Markup, EscapesAndReplaces) {
  EXPECT_EQ(escape_xml("a<b>&\"'"), "a&lt;b&gt;&amp;&quot;&#39;");
  EXPECT_EQ(escape_xml("\u00e9\u201c\u4e2d\U0001f600\t\n"), "\u00e9\u201c\u4e2d\U0001f600\t\n");
  EXPECT_EQ(escape_xml(std::string_view("\0\x1b", 2)), "\uFFFD\uFFFD");
  EXPECT_EQ(escape_xml("\xff"), "\uFFFD");
  EXPECT_EQ(escape_xml("\xC0\x80"), "\uFFFD\uFFFD");                 // overlong
  EXPECT_EQ(escape_xml("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");       // surrogate
  EXPECT_EQ(escape_xml("\xEF\xBF\xBE"), "\uFFFD\uFFFD\uFFFD");       // U+FFFE
  EXPECT_EQ(escape_xml("x\xE2\x80"), "x\uFFFD\uFFFD");               // cut off
  EXPECT_EQ(escape_xml("\xF4\x90\x80\x80").substr(0, 3), "\uFFFD");  // beyond U+10FFFF
}

TEST(Markup, LabelsAndNumbers) {
  EXPECT_EQ(token_label(" the", 12), "the");
  EXPECT_EQ(token_label("  ", 12), "\u2423");
  EXPECT_EQ(token_label(".\n\n", 12), ".\u21b5\u21b5");
  EXPECT_EQ(token_label("", 12), "\u2205");
  EXPECT_EQ(shorten("abcdef", 6), "abcdef");
  EXPECT_EQ(shorten("\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9", 6),
            "\u00e9\u00e9\u00e9\u00e9\u00e9\u2026");
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(16384), "16,384");
  EXPECT_EQ(grouped(-1234567), "-1,234,567");
  EXPECT_EQ(grouped(-123), "-123");
  EXPECT_EQ(coordinate(3), "3");
  EXPECT_EQ(coordinate(1.5), "1.5");
  EXPECT_EQ(coordinate(-0.001), "0");
}

TEST(Palette, EndpointsAndEvenLightness) {
  for (Rgb (*ramp)(double) : {dusk_colour, tide_colour}) {
    EXPECT_LT(lightness(ramp(0)), 0.32);
    EXPECT_GT(lightness(ramp(1)), 0.90);
    EXPECT_EQ(ramp(-3), ramp(0));
    EXPECT_EQ(ramp(7), ramp(1));
    EXPECT_EQ(ramp(std::numeric_limits<double>::quiet_NaN()), ramp(0));
    const double even = (lightness(ramp(1)) - lightness(ramp(0))) / 32;
    for (int i = 0; i < 32; ++i) {
      const double step = lightness(ramp((i + 1) / 32.0)) - lightness(ramp(i / 32.0));
      EXPECT_NEAR(step, even, 0.3 * even) << i;
    }
  }
  EXPECT_EQ(colour_level(0), 0);
  EXPECT_EQ(colour_level(1), kColourLevels - 1);
  EXPECT_EQ(colour_level(0.5), kColourLevels / 2);
}

TEST(Palette, MoreIsFartherFromTheBackground) {
  const std::string dark_end = hex(dusk_colour(0)), light_end = hex(dusk_colour(1));
  const std::string on_light = ramp_css("a", "stroke", dusk_colour, false);
  const std::string on_dark = ramp_css("a", "stroke", dusk_colour, true);
  EXPECT_NE(on_light.find(".a0{stroke:" + light_end + "}"), std::string::npos);
  EXPECT_NE(on_light.find(".a63{stroke:" + dark_end + "}"), std::string::npos);
  EXPECT_NE(on_dark.find(".a0{stroke:" + dark_end + "}"), std::string::npos);
  EXPECT_NE(on_dark.find(".a63{stroke:" + light_end + "}"), std::string::npos);
}

TEST(Axis, SharesAndTicks) {
  const ValueAxis log{64, 16384, true, 100, 200};
  EXPECT_DOUBLE_EQ(log.share(64), 0);
  EXPECT_DOUBLE_EQ(log.share(1024), 0.5);
  EXPECT_DOUBLE_EQ(log.share(1e9), 1);
  EXPECT_DOUBLE_EQ(log.at(16384), 300);
  EXPECT_EQ(log.ticks(50), (std::vector<double>{64, 256, 1024, 4096, 16384}));
  const ValueAxis mass{0.8, 1, false, 0, 200};
  EXPECT_EQ(mass.ticks(50).size(), 5U);
  EXPECT_NEAR(mass.ticks(50).front(), 0.8, 1e-9);
  EXPECT_NEAR(mass.ticks(50).back(), 1, 1e-9);
}

TEST(Grid, RowsGroupsAndDenseLayers) {
  const InspectData data = sample(4, 1, 8, 2, 5);
  const HeatGrid grid = make_grid(data, kept_of, true, {2048, 384, 100000});
  ASSERT_EQ(grid.rows.size(), 1U + 3 * 8);
  EXPECT_TRUE(grid.rows[0].dense);
  EXPECT_TRUE(grid.rows[0].values.empty());
  EXPECT_EQ(grid.rows[9].layer, 2);
  EXPECT_EQ(grid.rows[9].values[3], static_cast<float>(kept_of(data.layers[2], 3, 0)));
  const HeatLayout layout = lay_out(grid, data, 0, 0, 10, 10, 15);
  const int within = layout.tops[2] - layout.tops[1];
  EXPECT_EQ(within, 10);
  EXPECT_GT(layout.tops[5] - layout.tops[4], within);                           // KV groups
  EXPECT_GT(layout.tops[9] - layout.tops[8], layout.tops[5] - layout.tops[4]);  // layers
  EXPECT_EQ(make_grid(data, kept_of, false, {2048, 384, 100000}).rows.size(), 24U);
}

TEST(Grid, MeansWhereThereIsTooMuch) {
  const InspectData data = sample(3, 0, 28, 4, 10);
  const HeatGrid grid = make_grid(data, kept_of, true, {12, 4, 1000});
  EXPECT_EQ(grid.heads_per_row, 7);  // whole KV groups
  EXPECT_EQ(grid.steps_per_column, 3);
  EXPECT_EQ(grid.columns, 4);
  double sum = 0;
  for (std::int32_t head = 7; head < 14; ++head) sum += kept_of(data.layers[1], 9, head);
  EXPECT_NEAR(grid.rows[5].values[3], sum / 7, 0.01);  // the last column holds one step
}

TEST(Grid, DenseStepsOfASparseLayerAreHatched) {
  InspectData data = sample(1, 0, 2, 1, 3);
  data.layers[0].path[1] = StepPath::kDenseShort;
  const HeatGrid grid = make_grid(data, kept_of, true, {10, 10, 100});
  EXPECT_TRUE(std::isnan(grid.rows[0].values[1]));
  const HeatLayout layout = lay_out(grid, data, 0, 0, 10, 10, 15);
  const std::string svg = draw_cells(grid, layout, "a", [](double) { return 1.0; });
  EXPECT_NE(svg.find("class=\"hatched\" d=\"M10 0h10v10h-10z"), std::string::npos) << svg;
  EXPECT_NE(svg.find("class=\"a63\" d=\"m0 0h1m1 0h1"), std::string::npos) << svg;
}

TEST(Picture, WellFormedAtEverySize) {
  EXPECT_TRUE(well_formed(svg_of(InspectData())));
  EXPECT_TRUE(well_formed(draw_page(InspectData())));
  EXPECT_TRUE(well_formed(svg_of(sample(1, 0, 1, 1, 1))));
  EXPECT_TRUE(well_formed(draw_page(sample(1, 0, 1, 1, 1))));
  EXPECT_TRUE(well_formed(svg_of(sample(3, 3, 4, 2, 2))));  // all dense
  EXPECT_TRUE(well_formed(draw_page(sample(3, 3, 4, 2, 2))));
  EXPECT_TRUE(well_formed(svg_of(sample(8, 2, 8, 2, 48))));
  EXPECT_TRUE(well_formed(draw_page(sample(8, 2, 8, 2, 48))));
  EXPECT_TRUE(well_formed(draw_page(sample(2, 0, 4, 4, 0))));  // no step
}

TEST(Picture, NoNumberIsLost) {
  for (const int steps : {0, 1, 48}) {
    const std::string page = draw_page(sample(4, 1, 4, 2, steps));
    for (const char* bad : {"nan", "inf\"", "inf "}) {
      EXPECT_EQ(page.find(std::string("\"") + bad), std::string::npos) << bad << steps;
      EXPECT_EQ(page.find(std::string(" ") + bad), std::string::npos) << bad << steps;
    }
  }
}

TEST(Picture, EscapesEveryText) {
  InspectData data = sample(2, 1, 2, 1, 3);
  const std::string evil = "</script><b a='\"&\x01\xff]]>";
  data.model = data.device = data.policy = data.question = data.answer = data.verdict = evil;
  data.step_tokens = {evil, "<", "\n&"};
  for (const std::string& text : {svg_of(data), draw_page(data)}) {
    EXPECT_TRUE(well_formed(text));
    EXPECT_EQ(text.find("<b a"), std::string::npos);
  }
  EXPECT_EQ(count_of(draw_page(data), "</script"), 1);
}

TEST(Picture, NothingFromOutside) {
  const std::string page = draw_page(sample(4, 1, 4, 2, 10));
  EXPECT_EQ(count_of(page, "http"), 2);  // the names of the XHTML and SVG languages
  EXPECT_EQ(page.find("src="), std::string::npos);
  EXPECT_EQ(page.find("href="), std::string::npos);
}

TEST(Picture, DenseLayersAreNoMaximum) {
  const std::string mixed = svg_of(sample(2, 1, 2, 1, 4));
  EXPECT_EQ(count_of(mixed, "dense: every token is read"), 1);
  const std::string dense = svg_of(sample(2, 2, 2, 1, 4));
  EXPECT_EQ(count_of(dense, "dense: every token is read"), 2);
  EXPECT_NE(dense.find("nothing was pruned"), std::string::npos);
}

TEST(Picture, SaysWhichMass) {
  InspectData data = sample(2, 0, 2, 1, 4);
  EXPECT_NE(svg_of(data).find("Estimated attention mass kept"), std::string::npos);
  for (InspectLayer& layer : data.layers) layer.true_mass = layer.estimated_mass;
  data.audited = true;
  EXPECT_NE(svg_of(data).find("True attention mass kept"), std::string::npos);
  EXPECT_EQ(svg_of(data).find("Estimated"), std::string::npos);
}

TEST(Picture, LargeStaysUnderFiveMegabytes) {
  constexpr std::size_t kMost = 5'000'000;
  const InspectData large = sample(32, 2, 32, 32, 256);
  EXPECT_LT(svg_of(large).size(), kMost);
  EXPECT_LT(draw_page(large).size(), kMost);
  const InspectData grouped_heads = sample(32, 0, 32, 8, 156);
  EXPECT_LT(draw_page(grouped_heads).size(), kMost);
  const InspectData huge = sample(80, 0, 64, 8, 400);
  EXPECT_LT(draw_page(huge).size(), kMost);
  if (const char* folder = std::getenv("TWILIGHT_PICTURES"); folder != nullptr) {
    std::ofstream(std::string(folder) + "/large.html") << draw_page(large);
    std::ofstream(std::string(folder) + "/large.svg") << svg_of(large);
    std::ofstream(std::string(folder) + "/small.html") << draw_page(sample(8, 2, 8, 2, 48));
  }
}

}  // namespace
}  // namespace twilight::app
