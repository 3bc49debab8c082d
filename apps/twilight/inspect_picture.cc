#include "inspect_picture.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "inspect_panels.h"
#include "markup.h"
#include "palette.h"
#include "table.h"

namespace twilight::app {
namespace {

constexpr GridLimits kKeptLimits = {2048, 384, 262144};
constexpr GridLimits kMassLimits = {260, 384, 100000};

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
    for (const LayerBlock& block : blocks_of(picture.kept)) {
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
