#include "inspect_panels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "markup.h"
#include "palette.h"
#include "table.h"

namespace twilight::app {
namespace {

constexpr int kAngledLabelCell = 11;  // cells at least this wide carry their token's text
constexpr std::size_t kLabelChars = 12;

}  // namespace

std::string text_at(double x, double y, const char* classes, const std::string& text,
                    const char* extra) {
  return "<text x=\"" + coordinate(x) + "\" y=\"" + coordinate(y) + "\" class=\"" + classes + "\"" +
         extra + ">" + escape_xml(text) + "</text>\n";
}

std::string per_cent(double share) { return digits3(share * 100) + " %"; }

std::string mass_text(double mass) { return fixed(mass, 3); }

std::pair<double, double> kept_range(const InspectData& data) {
  double low = std::numeric_limits<double>::infinity(), high = 0;
  const auto heads = static_cast<std::size_t>(data.q_heads);
  for (const InspectLayer& layer : data.layers) {
    for (std::size_t i = 0; i < layer.kept.size(); ++i) {
      if (is_dense(layer.path[i / heads])) continue;
      low = std::min(low, static_cast<double>(layer.kept[i]));
      high = std::max(high, static_cast<double>(layer.kept[i]));
    }
  }
  return high > 0 ? std::pair(low, high) : std::pair(0.0, 0.0);
}

double mass_floor(const InspectData& data) {
  double low = 1;
  for (const InspectLayer& layer : data.layers) {
    for (const float mass : data.mass(layer)) low = std::min(low, static_cast<double>(mass));
  }
  return std::clamp(std::floor(low * 20 - 1e-6) / 20, 0.0, 0.95);
}

namespace {

// Values of the sparse steps of one layer; `width` entries a step.
template <typename T>
std::vector<double> sparse_values(const InspectLayer& layer, const std::vector<T>& values,
                                  std::int32_t width) {
  std::vector<double> out;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!is_dense(layer.path[i / static_cast<std::size_t>(width)])) {
      out.push_back(static_cast<double>(values[i]));
    }
  }
  return out;
}

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

}  // namespace

std::vector<LayerBlock> blocks_of(const PictureMap& map) {
  std::vector<LayerBlock> out;
  const auto& rows = map.grid.rows;
  for (std::size_t i = 0; i < rows.size();) {
    std::size_t end = i + 1;
    while (end < rows.size() && rows[end].layer == rows[i].layer) ++end;
    const int bottom = map.layout.tops[end - 1] +
                       (rows[end - 1].dense ? map.layout.dense_height : map.layout.row_height);
    out.push_back({rows[i].layer, rows[i].dense, i, end, map.layout.y + map.layout.tops[i],
                   static_cast<double>(bottom - map.layout.tops[i])});
    i = end;
  }
  return out;
}

std::string row_labels(const InspectData& data, const PictureMap& map) {
  std::string out;
  const std::int32_t group = std::max(data.q_heads / std::max(data.kv_heads, 1), 1);
  double last_label = -100;
  for (const LayerBlock& block : blocks_of(map)) {
    const double middle = block.y + block.height / 2;
    if (middle - last_label >= 11) {
      out += text_at(kMargin, middle + 4, "label strong", "layer " + std::to_string(block.layer));
      last_label = middle;
    }
    if (block.dense) continue;
    for (std::size_t first = block.first; first < block.end;) {
      const std::int32_t kv = map.grid.rows[first].first_head / group;
      std::size_t end = first + 1;
      while (end < block.end && map.grid.rows[end].first_head / group == kv) ++end;
      const double top = map.layout.y + map.layout.tops[first];
      const double height = map.layout.tops[end - 1] - map.layout.tops[first] +
                            static_cast<double>(map.layout.row_height);
      out += "<path class=\"bracket\" d=\"M" + coordinate(kPlotX - 18) + " " +
             coordinate(top + 0.5) + "v" + coordinate(std::max(height - 1, 1.0)) + "\"/>\n";
      if (height >= 11) {
        out += text_at(kPlotX - 24, top + height / 2 + 3.5, "label muted end",
                       "KV " + std::to_string(kv));
      }
      first = end;
    }
    if (map.layout.row_height < 9) continue;
    for (std::size_t i = block.first; i < block.end; ++i) {
      out +=
          text_at(kPlotX - 5, map.layout.y + map.layout.tops[i] + map.layout.row_height / 2.0 + 3,
                  "tiny muted end", std::to_string(map.grid.rows[i].first_head));
    }
  }
  return out;
}

std::string column_labels(const InspectData& data, const PictureMap& map, bool tokens) {
  std::string out;
  const int cell = map.layout.cell_width;
  const double y = map.layout.y - 6;
  if (tokens && cell >= kAngledLabelCell && map.grid.steps_per_column == 1) {
    for (int column = 0; column < map.grid.columns; ++column) {
      const double x = map.layout.x + (column + 0.5) * cell + 3;
      const std::string rotate =
          " transform=\"rotate(-60 " + coordinate(x) + " " + coordinate(y) + ")\"";
      out += text_at(x, y, "token",
                     token_label(data.step_tokens[static_cast<std::size_t>(column)], kLabelChars),
                     rotate.c_str());
    }
    return out;
  }
  // The number of the token in the answer; the first has no step.
  int every = 1;
  for (int i = 0; every * cell < 44 * map.grid.steps_per_column; ++i) every *= i % 3 == 1 ? 1 : 2;
  const auto steps = static_cast<int>(data.steps());
  for (int number = every; number <= steps + 1; number += every) {
    if (number < 2) continue;
    const int column = (number - 2) / map.grid.steps_per_column;
    const double x = map.layout.x + (column + 0.5) * cell;
    out += "<path class=\"tick\" d=\"M" + coordinate(x) + " " + coordinate(y + 1) + "v4\"/>";
    out += text_at(x, y - 3, "label muted middle", std::to_string(number));
  }
  return out;
}

std::string panel_axis(const PictureMap& map, const char* prefix, double colour_end,
                       const std::string& title, bool decimals) {
  std::string out;
  const ValueAxis& axis = map.axis;
  const double y = map.layout.y;
  const double end = axis.x + axis.width;
  out += text_at(axis.x, y - 46, "label", title);
  const double colours = axis.at(colour_end) - axis.x;
  out += "<g class=\"cells\" stroke-width=\"10\" transform=\"translate(" + coordinate(axis.x) +
         " " + coordinate(y - 33) + ")\">";
  for (int level = 0; level < kColourLevels; ++level) {
    const double from = colours * level / kColourLevels;
    out += "<path class=\"" + std::string(prefix) + std::to_string(level) + "\" d=\"M" +
           coordinate(from) + " 0H" + coordinate(colours * (level + 1) / kColourLevels) + "\"/>";
  }
  out += "</g>\n";
  if (axis.x + colours < end - 1) {
    out += "<path class=\"frame\" d=\"M" + coordinate(axis.x + colours) + " " +
           coordinate(y - 37.5) + "H" + coordinate(end) + "v9H" + coordinate(axis.x + colours) +
           "\"/>\n";
  }
  std::string lines;
  std::vector<double> ticks = axis.ticks(48);
  // The context itself ends the axis of counts.
  if (axis.logarithmic && (ticks.empty() || end - axis.at(ticks.back()) > 44)) {
    ticks.push_back(axis.high);
  }
  for (const double tick : ticks) {
    const double x = axis.at(tick);
    lines +=
        concat("M", coordinate(x), " ", coordinate(y - 8), "V", coordinate(y + map.layout.height));
    out += text_at(x, y - 13, "label muted middle",
                   decimals ? fixed(tick, 2) : grouped(std::llround(tick)));
  }
  return "<path class=\"axis\" d=\"" + lines + "\"/>\n" + out;
}

std::string diamond(double x, double y, double r) {
  return "<path class=\"candidates\" d=\"M" + coordinate(x - r) + " " + coordinate(y) + "l" +
         coordinate(r) + " " + coordinate(-r) + "l" + coordinate(r) + " " + coordinate(r) + "l" +
         coordinate(-r) + " " + coordinate(r) + "z\"/>";
}

std::string triangle(double x, double y, double r) {
  return "<path class=\"union\" d=\"M" + coordinate(x - r) + " " + coordinate(y + r) + "h" +
         coordinate(2 * r) + "l" + coordinate(-r) + " " + coordinate(-2 * r) + "z\"/>";
}

std::string kept_panel(const InspectData& data, const PictureMap& map) {
  std::string out;
  for (const LayerBlock& block : blocks_of(map)) {
    const InspectLayer& layer = data.layers[static_cast<std::size_t>(block.layer)];
    const std::string name = "layer " + std::to_string(block.layer);
    if (block.dense) {
      const std::int32_t tokens = layer.tokens.empty() ? 0 : layer.tokens.back();
      out += "<g><title>" + name +
             ": dense, every token read</title><path class=\"denseline\" d=\"M" +
             coordinate(map.axis.x) + " " + coordinate(block.y + block.height / 2) + "H" +
             coordinate(map.axis.at(tokens)) + "\"/></g>\n";
      continue;
    }
    const std::vector<double> kept = sparse_values(layer, layer.kept, data.q_heads);
    const double joined = mean_of(sparse_values(layer, layer.attended, data.kv_heads));
    const double candidates = mean_of(sparse_values(layer, layer.candidates, data.kv_heads));
    const std::string summary = concat("mean ", grouped(std::llround(mean_of(kept))), " · union ",
                                       grouped(std::llround(joined)), " of ",
                                       grouped(std::llround(candidates)), " candidates");
    const bool has_text = block.height >= 40;
    const double y = block.y + (has_text ? 16 : 1);
    const double height = std::min(block.height - (has_text ? 18 : 2), 46.0);
    const double middle = y + height / 2;
    out += concat("<g><title>", escape_xml(concat(name, ", tokens kept: ", summary)), "</title>",
                  draw_violin(kept, map.axis, y, height), triangle(map.axis.at(joined), middle, 4),
                  diamond(map.axis.at(candidates), middle, 4.5), "</g>\n");
    if (has_text) out += text_at(map.axis.x, block.y + 9, "tiny muted halo", summary);
  }
  return out;
}

std::string mass_panel(const InspectData& data, const PictureMap& map) {
  std::string out;
  for (const LayerBlock& block : blocks_of(map)) {
    const InspectLayer& layer = data.layers[static_cast<std::size_t>(block.layer)];
    const std::vector<double> mass = sparse_values(layer, data.mass(layer), data.q_heads);
    out += "<g><title>layer " + std::to_string(block.layer) + ": mean " + mass_kind(data) +
           " mass " + mass_text(mean_of(mass)) + "</title>" +
           draw_violin(mass, map.axis, block.y, std::min(block.height, 34.0)) + "</g>\n";
  }
  return out;
}

std::string row_titles(const InspectData& data, const PictureMap& map, bool mass) {
  std::string out = "<g class=\"hits\">";
  const std::int32_t group = std::max(data.q_heads / std::max(data.kv_heads, 1), 1);
  for (std::size_t i = 0; i < map.grid.rows.size(); ++i) {
    const HeatGrid::Row& row = map.grid.rows[i];
    std::string title = "layer " + std::to_string(row.layer);
    if (row.dense) {
      title += ": dense, every token read";
    } else {
      title += ", query head " + std::to_string(row.first_head);
      if (map.grid.heads_per_row > 1) {
        title += " to " + std::to_string(row.first_head + map.grid.heads_per_row - 1);
      }
      title += " (KV head " + std::to_string(row.first_head / group) + "): ";
      std::vector<double> values;
      for (const float value : row.values) {
        if (!std::isnan(value)) values.push_back(static_cast<double>(value));
      }
      const auto [low, high] = std::minmax_element(values.begin(), values.end());
      if (values.empty()) {
        title += "dense";
      } else if (mass) {
        title += mass_kind(data) + " mass " + mass_text(mean_of(values)) + " (" + mass_text(*low) +
                 " to " + mass_text(*high) + ")";
      } else {
        title += "mean " + grouped(std::llround(mean_of(values))) + " tokens kept (" +
                 grouped(std::llround(*low)) + " to " + grouped(std::llround(*high)) + ")";
      }
    }
    out += "<rect x=\"" + coordinate(map.layout.x) + "\" y=\"" +
           coordinate(map.layout.y + map.layout.tops[i]) + "\" width=\"" +
           coordinate(map.layout.width(map.grid)) + "\" height=\"" +
           std::to_string(row.dense ? map.layout.dense_height : map.layout.row_height) +
           "\"><title>" + escape_xml(title) + "</title></rect>\n";
  }
  return out + "</g>\n";
}

std::string hit_area(const PictureMap& map, const std::string& id) {
  return "<rect class=\"hit\" id=\"hit-" + id + "\" x=\"" + coordinate(map.layout.x) + "\" y=\"" +
         coordinate(map.layout.y) + "\" width=\"" + coordinate(map.layout.width(map.grid)) +
         "\" height=\"" + std::to_string(map.layout.height) +
         "\"/><rect class=\"cursor\" id=\"cursor-" + id + "\" width=\"0\" height=\"0\"/>\n";
}

}  // namespace twilight::app
