#ifndef TWILIGHT_APPS_HEATMAP_H_
#define TWILIGHT_APPS_HEATMAP_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "inspect_data.h"

namespace twilight::app {

/// A grid of values, rows from the bottom layer up in reading order, ready to draw. Where there are
/// more heads or steps than a picture can show, a row stands for `heads_per_row` neighbouring query
/// heads and a column for `steps_per_column` steps, and a cell for their mean.
struct HeatGrid {
  struct Row {
    std::int32_t layer = 0, first_head = 0;
    bool dense = false;         ///< a layer without a sparse step: one row, no cells
    std::vector<float> values;  ///< [columns]; NaN where every step of the cell was dense
  };
  int columns = 0;
  int steps_per_column = 1;
  int heads_per_row = 1;
  std::vector<Row> rows;
};

struct GridLimits {
  int rows, columns, cells;
};

/// Value of a layer at a step and query head.
using CellValue = std::function<double(const InspectLayer&, std::size_t step, std::int32_t head)>;

/// `dense_rows`: whether layers that were dense throughout get a row. A row holds a
/// part of one KV group or whole groups.
[[nodiscard]] HeatGrid make_grid(const InspectData& data, const CellValue& value, bool dense_rows,
                                 const GridLimits& limits);

/// Where the rows and columns of a grid lie, in pixels of the picture.
struct HeatLayout {
  double x = 0, y = 0;  ///< top left corner
  int cell_width = 1, row_height = 1;
  int dense_height = 1;   ///< height of the row of a dense layer
  std::vector<int> tops;  ///< [rows] offset of each row from y
  int height = 0;

  [[nodiscard]] double width(const HeatGrid& grid) const {
    return static_cast<double>(cell_width) * grid.columns;
  }
};

/// Rows with small gaps between KV groups and larger ones between layers.
[[nodiscard]] HeatLayout lay_out(const HeatGrid& grid, const InspectData& data, double x, double y,
                                 int cell_width, int row_height, int dense_height);

/// The cells as SVG: one path for each colour level, class "<prefix><level>"; `share` maps a value
/// to 0 .. 1. Dense cells and rows are hatched (pattern "hatch" of the document).
[[nodiscard]] std::string draw_cells(const HeatGrid& grid, const HeatLayout& layout,
                                     std::string_view prefix,
                                     const std::function<double(double)>& share);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_HEATMAP_H_
