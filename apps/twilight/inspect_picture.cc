#include "inspect_picture.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "markup.h"
#include "palette.h"
#include "table.h"

namespace twilight::app {
namespace {

constexpr GridLimits kKeptLimits = {2048, 384, 262144};
constexpr GridLimits kMassLimits = {260, 384, 100000};

// Pixels.
constexpr double kMargin = 28, kGutter = 104, kPlotWidth = 768, kPanelGap = 46, kPanelWidth = 226;
constexpr double kPlotX = kMargin + kGutter;
constexpr double kNarrowestPlot = 420;
constexpr int kAngledLabelCell = 11;  // cells at least this wide carry their token's text
constexpr std::size_t kLabelChars = 12;

std::string text_at(double x, double y, const char* classes, const std::string& text,
                    const char* extra = "") {
  return "<text x=\"" + coordinate(x) + "\" y=\"" + coordinate(y) + "\" class=\"" + classes + "\"" +
         extra + ">" + escape_xml(text) + "</text>\n";
}

std::string per_cent(double share) { return digits3(share * 100) + " %"; }

std::string mass_text(double mass) { return fixed(mass, 3); }

// Smallest and largest kept count of the sparse steps; {0, 0} without one.
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

// First row and pixel span of each layer of a map.
struct Block {
  std::int32_t layer;
  bool dense;
  std::size_t first, end;
  double y, height;
};

std::vector<Block> blocks_of(const PictureMap& map) {
  std::vector<Block> out;
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
  for (const Block& block : blocks_of(map)) {
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

// Colour bar over the axis of the right panel, its ticks and thin lines down along the map.
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
  for (const Block& block : blocks_of(map)) {
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
  for (const Block& block : blocks_of(map)) {
    const InspectLayer& layer = data.layers[static_cast<std::size_t>(block.layer)];
    const std::vector<double> mass = sparse_values(layer, data.mass(layer), data.q_heads);
    out += "<g><title>layer " + std::to_string(block.layer) + ": mean " + mass_kind(data) +
           " mass " + mass_text(mean_of(mass)) + "</title>" +
           draw_violin(mass, map.axis, block.y, std::min(block.height, 34.0)) + "</g>\n";
  }
  return out;
}

// Invisible rows over a map, so that a viewer shows what the pointer is on.
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

// A transparent rectangle and a cursor for the script of a page.
std::string hit_area(const PictureMap& map, const std::string& id) {
  return "<rect class=\"hit\" id=\"hit-" + id + "\" x=\"" + coordinate(map.layout.x) + "\" y=\"" +
         coordinate(map.layout.y) + "\" width=\"" + coordinate(map.layout.width(map.grid)) +
         "\" height=\"" + std::to_string(map.layout.height) +
         "\"/><rect class=\"cursor\" id=\"cursor-" + id + "\" width=\"0\" height=\"0\"/>\n";
}

std::string draw_headline(const InspectData& data, double width, double& y) {
  std::string out = text_at(kMargin, y + 34, "title", "What attention read");
  out += text_at(width - kMargin, y + 34, "label muted end", data.device);
  y += 72;
  const auto figures = headline_figures(data);
  const double step = (width - 2 * kMargin) / static_cast<double>(figures.size());
  double x = kMargin;
  for (const auto& [name, value] : figures) {
    out += text_at(x, y + 14, "figure", shorten(value, 20));
    out += text_at(x, y + 33, "label muted", name);
    x += step;
  }
  y += 58;
  const std::size_t line = static_cast<std::size_t>((width - 2 * kMargin - 74) / 6.9);
  const auto line_of = [&](const char* name, const std::string& value) {
    std::string flat = value;
    std::replace(flat.begin(), flat.end(), '\n', ' ');
    out += text_at(kMargin, y + 10, "body muted", name);
    out += text_at(kMargin + 74, y + 10, "body", shorten(flat, line));
    y += 21;
  };
  if (!data.question.empty()) line_of("Question", data.question);
  line_of("Answer", data.answer);
  if (!data.verdict.empty()) line_of("Fact", data.verdict);
  y += 16;
  return out;
}

}  // namespace

std::string mass_kind(const InspectData& data) { return data.audited ? "true" : "estimated"; }

std::vector<std::pair<std::string, std::string>> headline_figures(const InspectData& data) {
  std::vector<std::pair<std::string, std::string>> out = {
      {"model", data.model},
      {"tokens of context", grouped(data.prompt_tokens)},
      {"attention", data.policy},
      {"of dense KV bytes read", per_cent(data.bytes_ratio)}};
  if (data.kept_mean > 0) {
    out.emplace_back("the same, sparse layers", per_cent(data.sparse_bytes_ratio));
    out.emplace_back("tokens kept, mean", grouped(std::llround(data.kept_mean)));
    out.emplace_back(mass_kind(data) + " mass kept", mass_text(data.mass_mean));
  }
  return out;
}

std::string picture_css() {
  const auto ramps = [](bool dark) {
    return ramp_css("a", "stroke", dusk_colour, dark) + ramp_css("b", "stroke", tide_colour, dark);
  };
  return R"(:root{color-scheme:light dark;--surface:#fbfaf8;--ink:#1d1b26;--muted:#6a6675;--faint:#e2dfe6;
--ground:#ebe9ee;--line:#c3bfcb;--shape:#b9a7d6;--accent:#5b2d8a;--mark:#c2410c}
@media (prefers-color-scheme:dark){:root{--surface:#15131c;--ink:#efedf4;--muted:#a29daf;--faint:#2d2938;
--ground:#252230;--line:#4a4558;--shape:#5d4a86;--accent:#e3c7ff;--mark:#fb923c}}
.picture{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
.picture text{fill:var(--ink);font-size:11.5px}
.picture .title{font-size:23px;font-weight:650;letter-spacing:-.2px}
.picture .heading{font-size:15.5px;font-weight:650}
.picture .figure{font-size:19px;font-weight:600}
.picture .body{font-size:13px}
.picture .tiny{font-size:9.5px}
.picture .muted{fill:var(--muted)}
.picture .strong{font-weight:600}
.picture .end{text-anchor:end}
.picture .middle{text-anchor:middle}
.picture .token{font-size:10.5px}
.picture .halo{paint-order:stroke;stroke:var(--surface);stroke-width:3px;stroke-linejoin:round}
.backdrop{fill:var(--surface)}
.cells{fill:none;shape-rendering:crispEdges}
.gridline{fill:none;stroke:var(--surface);stroke-width:1;shape-rendering:crispEdges}
.hatched{fill:url(#hatch)}
.hatch-ground{fill:var(--ground)}
.hatch-line{stroke:var(--line);stroke-width:2}
.bracket{fill:none;stroke:var(--muted);stroke-width:1.5}
.tick,.axis{fill:none;stroke:var(--faint);stroke-width:1}
.tick{stroke:var(--muted)}
.frame{fill:none;stroke:var(--line);stroke-width:1}
.violin{fill:var(--shape);fill-opacity:.75}
.spread{fill:var(--accent)}
.median{fill:none;stroke:var(--accent);stroke-width:2.5}
.union{fill:var(--mark)}
.candidates{fill:var(--surface);stroke:var(--ink);stroke-width:1.3}
.denseline{fill:none;stroke:var(--line);stroke-width:4;stroke-dasharray:2 3}
.hits rect,.hit{fill:none;pointer-events:all}
.cursor{fill:none;stroke:var(--ink);stroke-width:1.5;pointer-events:none}
)" + ramps(false) +
         "\n@media (prefers-color-scheme:dark){" + ramps(true) + "}\n";
}

Picture draw_picture(const InspectData& data, const PictureOptions& options) {
  Picture picture;
  const auto heads = static_cast<std::size_t>(data.q_heads);
  picture.kept.grid = make_grid(
      data,
      [heads](const InspectLayer& layer, std::size_t step, std::int32_t head) {
        return layer.kept[step * heads + static_cast<std::size_t>(head)];
      },
      true, kKeptLimits);
  const HeatGrid& grid = picture.kept.grid;
  const int cell = std::clamp(static_cast<int>(kPlotWidth) / std::max(grid.columns, 1), 2, 40);
  const double plot = std::max(static_cast<double>(cell) * grid.columns, kNarrowestPlot);
  const double panel = kPlotX + plot + kPanelGap;
  const double width = panel + kPanelWidth + kMargin;
  const auto [low, high] = kept_range(data);
  const double longest = std::max(
      {static_cast<double>(data.prompt_tokens + 1 + std::ssize(data.step_tokens)), high, 2.0});
  const double axis_low = std::exp2(std::floor(std::log2(std::max(low, 1.0))));
  picture.kept.axis = {std::min(axis_low, longest / 2), longest, true, panel, kPanelWidth};
  // Colours end at the most any sparse head kept; a range of at least an octave.
  ValueAxis colours = picture.kept.axis;
  colours.high = std::clamp(high, std::min(2 * colours.low, longest), longest);

  std::string body;
  double y = options.standalone ? 0 : -14;
  if (options.standalone) body += draw_headline(data, width, y);
  const bool any_rows = grid.columns > 0 && !grid.rows.empty();
  const auto sparse_rows =
      std::count_if(grid.rows.begin(), grid.rows.end(), [](const auto& row) { return !row.dense; });
  const int row_height =
      std::clamp(static_cast<int>(900 / std::max<std::int64_t>(sparse_rows, 1)), 2, 13);
  y += 32;
  body += text_at(kMargin, y, "heading", "Tokens kept, by query head and generated token");
  std::string caption =
      "Each row is a query head, each column a token of the answer. Stronger "
      "against the background: more tokens kept.";
  if (grid.heads_per_row > 1) {
    caption += " A row is the mean of " + std::to_string(grid.heads_per_row) + " heads.";
  }
  if (grid.steps_per_column > 1) {
    caption += " A column is the mean of " + std::to_string(grid.steps_per_column) + " tokens.";
  }
  body += text_at(kMargin, y + 20, "body muted", caption);
  if (!any_rows) {
    body += text_at(kMargin, y + 52, "body", "No decode step: nothing was read.");
    y += 80;
  } else {
    y += 120;
    picture.kept.layout = lay_out(grid, data, kPlotX, y, cell, row_height, 15);
    body += panel_axis(picture.kept, "a", colours.high, "tokens kept (log scale, ends at context)",
                       false);
    body += draw_cells(grid, picture.kept.layout, "a", [&](double v) { return colours.share(v); });
    for (const Block& block : blocks_of(picture.kept)) {
      if (!block.dense) continue;
      const double height = std::min(block.height, 13.0);
      body += "<rect class=\"backdrop\" x=\"" + coordinate(kPlotX + 6) + "\" y=\"" +
              coordinate(block.y + (block.height - height) / 2) + "\" width=\"140\" height=\"" +
              coordinate(height) + "\" rx=\"3\"/>" +
              text_at(kPlotX + 11, block.y + block.height / 2 + 3.5, "tiny",
                      "dense: every token is read");
    }
    body += column_labels(data, picture.kept, true) + row_labels(data, picture.kept) +
            kept_panel(data, picture.kept);
    body +=
        options.standalone ? row_titles(data, picture.kept, false) : hit_area(picture.kept, "kept");
    y += picture.kept.layout.height + 22;
    // Key: what the marks of the panel and the hatching mean.
    body += "<path class=\"hatched\" d=\"M" + coordinate(kPlotX) + " " + coordinate(y - 9) +
            "h22v11h-22z\"/>" + text_at(kPlotX + 28, y, "label muted", "dense, not pruned");
    body += "<path class=\"median\" d=\"M" + coordinate(panel + 4) + " " + coordinate(y - 10) +
            "v12\"/>" + text_at(panel + 11, y, "label muted", "median") +
            triangle(panel + 64, y - 4, 4) + text_at(panel + 72, y, "label muted", "union") +
            diamond(panel + 116, y - 4, 4.5) + text_at(panel + 125, y, "label muted", "candidates");
    y += 14;
  }

  if (any_rows && sparse_rows > 0) {
    picture.mass.grid = make_grid(
        data,
        [&](const InspectLayer& layer, std::size_t step, std::int32_t head) {
          return static_cast<double>(
              data.mass(layer)[step * heads + static_cast<std::size_t>(head)]);
        },
        false, kMassLimits);
    const HeatGrid& mass = picture.mass.grid;
    const auto rows = static_cast<int>(mass.rows.size());
    picture.mass.axis = {mass_floor(data), 1, false, panel, kPanelWidth};
    y += 34;
    body += text_at(kMargin, y, "heading",
                    data.audited ? "True attention mass kept" : "Estimated attention mass kept");
    body += text_at(kMargin, y + 20, "body muted",
                    data.audited
                        ? "Share of the full softmax over every key that the attended tokens hold."
                        : "Share of the candidates' estimated mass that the attended tokens hold "
                          "(--audit measures the true share).");
    y += 82;
    picture.mass.layout =
        lay_out(mass, data, kPlotX, y,
                cell * mass.columns == cell * grid.columns
                    ? cell
                    : std::max(2, static_cast<int>(kPlotWidth) / std::max(mass.columns, 1)),
                std::clamp(330 / std::max(rows, 1), 2, 6), 8);
    body += panel_axis(picture.mass, "b", 1, mass_kind(data) + " mass", true);
    body += draw_cells(mass, picture.mass.layout, "b",
                       [&](double v) { return picture.mass.axis.share(v); });
    body += column_labels(data, picture.mass, false) + row_labels(data, picture.mass) +
            mass_panel(data, picture.mass);
    body +=
        options.standalone ? row_titles(data, picture.mass, true) : hit_area(picture.mass, "mass");
    y += picture.mass.layout.height;
  } else if (any_rows) {
    body += text_at(kMargin, y + 20, "body", "Every layer ran dense: nothing was pruned.");
    y += 30;
  }
  y += kMargin;

  const double left = options.standalone ? 0 : kMargin;
  std::string svg =
      concat("<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"picture\" viewBox=\"",
             coordinate(left), " 0 ", coordinate(width - left), " ", coordinate(y), "\"");
  if (options.standalone) {
    svg += " width=\"" + coordinate(width) + "\" height=\"" + coordinate(y) + "\"";
  }
  svg += " role=\"img\" aria-label=\"Tokens kept by every layer and head\">\n";
  if (options.standalone) svg += "<style>\n" + picture_css() + "</style>\n";
  svg +=
      "<defs><pattern id=\"hatch\" patternUnits=\"userSpaceOnUse\" width=\"6\" height=\"6\" "
      "patternTransform=\"rotate(45)\"><rect class=\"hatch-ground\" width=\"6\" height=\"6\"/>"
      "<path class=\"hatch-line\" d=\"M1 0v6\"/></pattern></defs>\n";
  if (options.standalone) svg += "<rect class=\"backdrop\" width=\"100%\" height=\"100%\"/>\n";
  picture.svg = svg + body + "</svg>\n";
  return picture;
}

}  // namespace twilight::app
