#include "chart.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

namespace twilight::app {

void BudgetRecorder::record(const Engine& engine) {
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    for (const LayerStats& stats : engine.last_stats(static_cast<std::int32_t>(layer))) {
      Layer& out = layers_[layer];
      out.sparse = out.sparse || !is_dense(stats.path);
      out.tokens = stats.num_tokens;
      out.kept.insert(out.kept.end(), stats.kept.begin(), stats.kept.end());
    }
  }
}

Spread spread_of(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<std::size_t>(
        std::lround(share * static_cast<double>(values.size() - 1)))];
  };
  const double mean =
      std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  return {values.front(), at(0.1), mean, at(0.9), values.back()};
}

std::string budget_chart(const std::vector<BudgetRecorder::Layer>& layers) {
  constexpr int kCells = 40;
  double longest = 64;
  for (const auto& layer : layers) longest = std::max(longest, layer.tokens);
  const double low = std::log2(32.0);
  const double span = std::log2(longest) - low;
  const auto cell = [&](double tokens) {
    const double share = (std::log2(std::max(tokens, 32.0)) - low) / span;
    return std::clamp(static_cast<int>(std::lround(share * (kCells - 1))), 0, kCells - 1);
  };
  char line[160];
  std::string out =
      "Tokens kept per query head (bar: 10th to 90th percentile, | mean, log scale)\n";
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Spread s = spread_of(layers[i].kept);
    std::snprintf(line, sizeof(line), "  layer %2zu  ", i);
    out += line;
    if (!layers[i].sparse) {
      for (int c = 0; c < kCells; ++c) out += "─";
      std::snprintf(line, sizeof(line), "  dense, all %.0f\n", layers[i].tokens);
      out += line;
      continue;
    }
    for (int c = 0; c < kCells; ++c) {
      if (c == cell(s.mean)) {
        out += "┃";
      } else {
        out += c >= cell(s.p10) && c <= cell(s.p90) ? "▓" : "·";
      }
    }
    std::snprintf(line, sizeof(line), "  mean %.0f of %.0f (%.0f to %.0f)\n", s.mean,
                  layers[i].tokens, s.min, s.max);
    out += line;
  }
  return out;
}

}  // namespace twilight::app
