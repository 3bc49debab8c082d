#ifndef TWILIGHT_APPS_PARETO_PICTURE_H_
#define TWILIGHT_APPS_PARETO_PICTURE_H_

#include <string>
#include <vector>

namespace twilight::app {

/// One way of attention in the picture.
struct ParetoPoint {
  std::string label;      ///< for tooltips and the table
  std::string series;     ///< points of one name are drawn alike and joined
  double bytes = 1;       ///< share of dense KV bytes
  double loss = 0;        ///< what is lost against dense, 0.01 is 1 %; below 0 where it gained
  double half_width = 0;  ///< 95 % of the loss; NaN where unknown
  std::string value;      ///< the measured quantity in words, e.g. "ppl 22.84"
  std::string mark;       ///< text beside a point that stands out; else empty
  bool on_front = false;
};

struct ParetoData {
  std::string title, subtitle;
  std::string bytes_axis, loss_axis;  ///< names of the axes
  std::string dense;                  ///< what the dense line says
  std::vector<ParetoPoint> points;    ///< without the dense one
};

/// The picture as an SVG element: bytes on a logarithmic axis against loss, the dense line, series
/// in colours, the front as a line. Follows the light or dark scheme. Points far above the others
/// are drawn at the upper edge, hollow.
[[nodiscard]] std::string draw_pareto(const ParetoData& data, bool standalone);

/// A page of its own with the picture and a table of the points; well-formed XML as well.
[[nodiscard]] std::string pareto_page(const ParetoData& data);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_PARETO_PICTURE_H_
