#include "heatmap.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "markup.h"
#include "palette.h"

namespace twilight::app {
namespace {

// Steps below this width are drawn without lines between them.
constexpr int kGridLineWidth = 6;

std::vector<float> row_values(const InspectLayer& layer, const CellValue& value,
                              const HeatGrid& grid, std::int32_t first_head,
                              std::int32_t end_head) {
  std::vector<float> out(static_cast<std::size_t>(grid.columns));
  for (std::size_t column = 0; column < out.size(); ++column) {
    const std::size_t first = column * static_cast<std::size_t>(grid.steps_per_column);
    const std::size_t end =
        std::min(first + static_cast<std::size_t>(grid.steps_per_column), layer.path.size());
    double sum = 0;
    int count = 0;
    for (std::size_t step = first; step < end; ++step) {
      if (is_dense(layer.path[step])) continue;
      for (std::int32_t head = first_head; head < end_head; ++head, ++count) {
        sum += value(layer, step, head);
      }
    }
    out[column] =
        count > 0 ? static_cast<float>(sum / count) : std::numeric_limits<float>::quiet_NaN();
  }
  return out;
}

std::string rectangle(double x, double y, double width, double height) {
  return concat("M", coordinate(x), " ", coordinate(y), "h", coordinate(width), "v",
                coordinate(height), "h", coordinate(-width), "z");
}

}  // namespace

HeatGrid make_grid(const InspectData& data, const CellValue& value, bool dense_rows,
                   const GridLimits& limits) {
  HeatGrid grid;
  const auto steps = static_cast<int>(data.steps());
  while ((steps + grid.steps_per_column - 1) / grid.steps_per_column > limits.columns) {
    ++grid.steps_per_column;
  }
  grid.columns = (steps + grid.steps_per_column - 1) / grid.steps_per_column;
  std::int64_t sparse_layers = 0;
  for (const InspectLayer& layer : data.layers) sparse_layers += layer.all_dense() ? 0 : 1;
  const std::int32_t group = data.kv_heads > 0 ? std::max(data.q_heads / data.kv_heads, 1) : 1;
  const auto splits_groups = [&](int heads) { return group % heads != 0 && heads % group != 0; };
  const auto fits = [&] {
    const std::int64_t rows = sparse_layers * (data.q_heads / grid.heads_per_row);
    return rows <= limits.rows && rows * grid.columns <= limits.cells;
  };
  while (grid.heads_per_row < data.q_heads && !fits()) {
    do {
      ++grid.heads_per_row;
    } while (data.q_heads % grid.heads_per_row != 0 || splits_groups(grid.heads_per_row));
  }
  for (std::size_t i = 0; i < data.layers.size(); ++i) {
    const auto index = static_cast<std::int32_t>(i);
    if (data.layers[i].all_dense()) {
      if (dense_rows) grid.rows.push_back({index, 0, true, {}});
      continue;
    }
    for (std::int32_t head = 0; head < data.q_heads; head += grid.heads_per_row) {
      grid.rows.push_back({index, head, false,
                           row_values(data.layers[i], value, grid, head,
                                      std::min(head + grid.heads_per_row, data.q_heads))});
    }
  }
  return grid;
}

HeatLayout lay_out(const HeatGrid& grid, const InspectData& data, double x, double y,
                   int cell_width, int row_height, int dense_height) {
  HeatLayout layout{x, y, cell_width, row_height, dense_height, {}, 0};
  const int layer_gap = row_height < 4 ? 5 : 9;
  const int group_gap = row_height < 4 ? 1 : 3;
  const std::int32_t group = data.kv_heads > 0 ? std::max(data.q_heads / data.kv_heads, 1) : 1;
  int at = 0;
  for (std::size_t i = 0; i < grid.rows.size(); ++i) {
    if (i > 0) {
      const HeatGrid::Row& row = grid.rows[i];
      const HeatGrid::Row& above = grid.rows[i - 1];
      if (row.layer != above.layer) {
        at += layer_gap;
      } else if (group > 1 && row.first_head / group != above.first_head / group) {
        at += group_gap;
      }
    }
    layout.tops.push_back(at);
    at += grid.rows[i].dense ? dense_height : row_height;
  }
  layout.height = at;
  return layout;
}

std::string draw_cells(const HeatGrid& grid, const HeatLayout& layout, std::string_view prefix,
                       const std::function<double(double)>& share) {
  // Lines through the middle of the rows, x in columns and y in pixels; each run of one level
  // starts relative to the end of the run before it on its path.
  struct Path {
    std::string text;
    int x = 0, y = 0;
  };
  std::array<Path, kColourLevels> paths;
  std::string hatched;
  for (std::size_t i = 0; i < grid.rows.size(); ++i) {
    const HeatGrid::Row& row = grid.rows[i];
    const int top = layout.tops[i];
    if (row.dense) {
      hatched += rectangle(layout.x, layout.y + top, layout.width(grid), layout.dense_height);
      continue;
    }
    for (int column = 0; column < grid.columns;) {
      const auto level_at = [&](int c) {
        const float value = row.values[static_cast<std::size_t>(c)];
        return std::isnan(value) ? -1 : colour_level(share(static_cast<double>(value)));
      };
      const int level = level_at(column);
      int end = column + 1;
      while (end < grid.columns && level_at(end) == level) ++end;
      const int length = end - column;
      if (level < 0) {
        hatched += rectangle(layout.x + column * layout.cell_width, layout.y + top,
                             length * layout.cell_width, layout.row_height);
      } else {
        Path& path = paths[static_cast<std::size_t>(level)];
        const int dx = column - path.x;
        path.text += concat("m", std::to_string(dx), top < path.y ? "" : " ",
                            std::to_string(top - path.y), "h", std::to_string(length));
        path.x = end;
        path.y = top;
      }
      column = end;
    }
  }
  std::string out = "<g class=\"cells\" stroke-width=\"" + std::to_string(layout.row_height) +
                    "\" transform=\"translate(" + coordinate(layout.x) + " " +
                    coordinate(layout.y + layout.row_height / 2.0) + ") scale(" +
                    std::to_string(layout.cell_width) + " 1)\">";
  for (std::size_t level = 0; level < paths.size(); ++level) {
    if (paths[level].text.empty()) continue;
    out += "<path class=\"" + std::string(prefix) + std::to_string(level) + "\" d=\"" +
           paths[level].text + "\"/>";
  }
  out += "</g>\n";
  if (!hatched.empty()) out += "<path class=\"hatched\" d=\"" + hatched + "\"/>\n";
  if (layout.cell_width >= kGridLineWidth && grid.columns > 1) {
    out += "<path class=\"gridline\" d=\"";
    for (std::size_t i = 0; i < grid.rows.size(); ++i) {
      const bool first = i == 0 || grid.rows[i].layer != grid.rows[i - 1].layer;
      if (grid.rows[i].dense || !first) continue;
      std::size_t last = i;
      while (last + 1 < grid.rows.size() && grid.rows[last + 1].layer == grid.rows[i].layer) {
        ++last;
      }
      const int span = layout.tops[last] + layout.row_height - layout.tops[i];
      for (int column = 1; column < grid.columns; ++column) {
        out += concat("M", coordinate(layout.x + column * layout.cell_width), " ",
                      coordinate(layout.y + layout.tops[i]), "v", std::to_string(span));
      }
      if (layout.row_height < kGridLineWidth) continue;
      for (std::size_t r = i + 1; r <= last; ++r) {
        out += concat("M", coordinate(layout.x), " ", coordinate(layout.y + layout.tops[r]), "h",
                      coordinate(layout.width(grid)));
      }
    }
    out += "\"/>\n";
  }
  return out;
}

}  // namespace twilight::app
