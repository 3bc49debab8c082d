#include "pareto_picture.h"

#include <algorithm>
#include <cmath>

#include "inspect_picture.h"
#include "markup.h"
#include "palette.h"
#include "table.h"

namespace twilight::app {
namespace {

constexpr double kWidth = 1000, kHeight = 620;
constexpr double kLeft = 84, kRight = 250, kTop = 92, kBottom = 66;
constexpr int kColours = 8;  // of series; later ones start again

// A round step that cuts `range` into about `pieces`.
double nice_step(double range, int pieces) {
  const double raw = range / pieces;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

struct Axes {
  double bytes_low = 0.01, bytes_high = 1;
  double loss_low = 0, loss_high = 0.01, loss_step = 0.002;

  [[nodiscard]] double x(double bytes) const {
    return kLeft + (kWidth - kLeft - kRight) * std::log(bytes / bytes_low) /
                       std::log(bytes_high / bytes_low);
  }
  [[nodiscard]] double y(double loss) const {
    const double share = (std::min(loss, loss_high) - loss_low) / (loss_high - loss_low);
    return kHeight - kBottom - (kHeight - kTop - kBottom) * share;
  }
};

Axes make_axes(const std::vector<ParetoPoint>& points) {
  Axes axes;
  double low = 0, bytes = 1;
  std::vector<double> losses;
  for (const ParetoPoint& point : points) {
    bytes = std::min(bytes, point.bytes);
    low = std::min(low, point.loss);
    losses.push_back(point.loss);
  }
  axes.bytes_low = std::min(0.5, bytes * 0.85);
  std::sort(losses.begin(), losses.end());
  double high = losses.empty() ? 0.01 : losses.back();
  // A few points far up must not flatten the rest.
  if (!losses.empty()) {
    const double middle = losses[losses.size() / 2];
    const double usual = 4 * std::max(middle, 0.0025);
    if (high > 1.5 * usual) high = usual;
  }
  high = std::max(high, 0.002);
  axes.loss_step = nice_step(high - low, 6);
  axes.loss_low = std::floor(low / axes.loss_step) * axes.loss_step;
  axes.loss_high = std::ceil(high * 1.04 / axes.loss_step) * axes.loss_step;
  return axes;
}

std::string text(double x, double y, std::string_view classes, std::string_view content,
                 std::string_view more = "") {
  return concat("<text x=\"", coordinate(x), "\" y=\"", coordinate(y), "\" class=\"", classes, "\"",
                more, ">", escape_xml(content), "</text>\n");
}

std::string line(double x1, double y1, double x2, double y2, std::string_view classes) {
  return concat("<path class=\"", classes, "\" d=\"M", coordinate(x1), " ", coordinate(y1), "L",
                coordinate(x2), " ", coordinate(y2), "\"/>\n");
}

std::string percent(double share, int decimals, bool sign) {
  return concat(sign && share > 0 ? "+" : "", fixed(share * 100, decimals), " %");
}

int decimals_of(double step) {
  return std::clamp(static_cast<int>(std::ceil(-std::log10(step * 100) - 1e-9)), 0, 4);
}

std::string grid(const Axes& axes, const ParetoData& data) {
  std::string out;
  const double right = kWidth - kRight, bottom = kHeight - kBottom;
  const int decimals = decimals_of(axes.loss_step);
  const int steps =
      static_cast<int>(std::lround((axes.loss_high - axes.loss_low) / axes.loss_step));
  for (int i = 0; i <= steps; ++i) {
    const double loss = axes.loss_low + i * axes.loss_step;
    const double y = axes.y(loss);
    out += line(kLeft, y, right, y, "axis");
    out += text(kLeft - 10, y + 4, "muted end",
                percent(std::abs(loss) < axes.loss_step / 2 ? 0 : loss, decimals, true));
  }
  double last = -1e9;
  for (const double bytes :
       {0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0}) {
    if (bytes < axes.bytes_low || axes.x(bytes) - last < 34) continue;
    const double x = last = axes.x(bytes);
    out += line(x, kTop, x, bottom, "axis");
    out += text(x, bottom + 20, "muted middle", percent(bytes, bytes < 0.01 ? 1 : 0, false));
  }
  out += concat("<rect class=\"frame\" x=\"", coordinate(kLeft), "\" y=\"", coordinate(kTop),
                "\" width=\"", coordinate(right - kLeft), "\" height=\"", coordinate(bottom - kTop),
                "\"/>\n");
  out += text((kLeft + right) / 2, bottom + 46, "body middle", data.bytes_axis);
  const double middle = (kTop + bottom) / 2;
  out += text(22, middle, "body middle", data.loss_axis,
              concat(" transform=\"rotate(-90 22 ", coordinate(middle), ")\""));
  return out;
}

std::string tooltip(const ParetoPoint& point) {
  std::string out = point.label + ": " + percent(point.bytes, 1, false) + " of dense bytes, " +
                    point.value + ", " + percent(point.loss, 2, true);
  if (std::isfinite(point.half_width)) out += " \u00b1 " + fixed(point.half_width * 100, 2);
  return out;
}

std::vector<std::string> series_of(const std::vector<ParetoPoint>& points) {
  std::vector<std::string> names;
  for (const ParetoPoint& point : points) {
    if (std::find(names.begin(), names.end(), point.series) == names.end()) {
      names.push_back(point.series);
    }
  }
  return names;
}

std::string path_of(const Axes& axes, std::vector<ParetoPoint> points, std::string_view classes) {
  std::stable_sort(points.begin(), points.end(),
                   [](const ParetoPoint& a, const ParetoPoint& b) { return a.bytes < b.bytes; });
  std::string path;
  for (const ParetoPoint& point : points) {
    path += concat(path.empty() ? "M" : "L", coordinate(axes.x(point.bytes)), " ",
                   coordinate(axes.y(point.loss)));
  }
  return points.size() < 2 ? "" : concat("<path class=\"", classes, "\" d=\"", path, "\"/>\n");
}

std::string draw_series(const Axes& axes, const ParetoData& data, const std::string& name,
                        int colour) {
  std::vector<ParetoPoint> points;
  for (const ParetoPoint& point : data.points) {
    if (point.series == name) points.push_back(point);
  }
  const std::string style = "series s" + std::to_string(colour % kColours);
  std::string out = concat("<g class=\"", style, "\">\n", path_of(axes, points, "join"));
  for (const ParetoPoint& point : points) {
    const double x = axes.x(point.bytes), y = axes.y(point.loss);
    const bool above = point.loss > axes.loss_high;
    if (std::isfinite(point.half_width) && !above) {
      out += line(x, axes.y(std::max(point.loss - point.half_width, axes.loss_low)), x,
                  axes.y(point.loss + point.half_width), "error");
    }
    out += concat("<circle cx=\"", coordinate(x), "\" cy=\"", coordinate(y), "\" r=\"",
                  point.mark.empty() ? "4.5" : "7", "\" class=\"", above ? "hollow" : "dot",
                  "\"><title>", escape_xml(tooltip(point)), "</title></circle>\n");
  }
  return out + "</g>\n";
}

std::string draw_marks(const Axes& axes, const ParetoData& data) {
  std::string out;
  for (const ParetoPoint& point : data.points) {
    if (point.mark.empty()) continue;
    const bool above = point.loss > axes.loss_high;
    out += text(axes.x(point.bytes) + 10, axes.y(point.loss) + (above ? 16 : -8), "strong halo",
                point.mark);
  }
  return out;
}

std::string draw_legend(const ParetoData& data, const std::vector<std::string>& names) {
  const double x = kWidth - kRight + 26;
  double y = kTop + 10;
  std::string out;
  for (std::size_t i = 0; i < names.size(); ++i, y += 24) {
    out += concat("<g class=\"series s", std::to_string(i % kColours),
                  "\"><circle class=\"dot\" cx=\"", coordinate(x), "\" cy=\"", coordinate(y),
                  "\" r=\"5\"/></g>\n");
    out += text(x + 14, y + 4, "body", shorten(names[i], 28));
  }
  y += 6;
  out += line(x - 7, y, x + 7, y, "front");
  out += text(x + 14, y + 4, "body", "front: nothing loses less");
  out += text(x + 14, y + 19, "muted", "with fewer bytes");
  y += 42;
  out += line(x - 7, y, x + 7, y, "denseline");
  out += text(x + 14, y + 4, "body", data.dense);
  y += 24;
  out += text(x - 7, y + 4, "muted", "bars: 95 % of the sampling error");
  return out;
}

std::string css() {
  std::string out = picture_css();
  for (const bool dark : {false, true}) {
    if (dark) out += "@media (prefers-color-scheme:dark){";
    for (int i = 0; i < kColours; ++i) {
      // Both ramps in turn, away from their ends, which are too near the background.
      const int step = i / 2;
      constexpr int kSteps = kColours / 2 - 1;
      const double t = 0.18 + 0.62 * step / kSteps;
      const double shade = dark ? 0.35 + 0.6 * t : 0.1 + 0.65 * t;
      const std::string colour = hex(i % 2 == 0 ? dusk_colour(shade) : tide_colour(shade));
      out += concat(".s", std::to_string(i), "{color:", colour, "}");
    }
    if (dark) out += "}";
  }
  return out + R"(
.series .dot{fill:currentColor;stroke:var(--surface);stroke-width:1}
.series .hollow{fill:var(--surface);stroke:currentColor;stroke-width:2}
.series .join{fill:none;stroke:currentColor;stroke-width:1.2;stroke-opacity:.45}
.series .error{fill:none;stroke:currentColor;stroke-width:1.2;stroke-opacity:.6}
.front{fill:none;stroke:var(--mark);stroke-width:3;stroke-opacity:.55;stroke-linejoin:round}
)";
}

constexpr const char* kPageCss = R"(
body{margin:0;background:var(--surface);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px}
svg.picture{width:100%;height:auto;display:block}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px;width:100%}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--faint)}
th{color:var(--muted);font-weight:500}
th:first-child,td:first-child{text-align:left}
tr.front td{font-weight:650}
)";

}  // namespace

std::string draw_pareto(const ParetoData& data, bool standalone) {
  const Axes axes = make_axes(data.points);
  const std::vector<std::string> names = series_of(data.points);
  std::string out =
      concat("<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"picture\" viewBox=\"0 0 ",
             coordinate(kWidth), " ", coordinate(kHeight), "\" role=\"img\"><title>",
             escape_xml(data.title), "</title>\n");
  if (standalone) out += concat("<style>\n", css(), "</style>\n");
  out += concat("<rect class=\"backdrop\" width=\"", coordinate(kWidth), "\" height=\"",
                coordinate(kHeight), "\"/>\n");
  out += text(kLeft - 60, 40, "title", data.title);
  out += text(kLeft - 60, 66, "body muted", data.subtitle);
  out += grid(axes, data);
  out += line(kLeft, axes.y(0), kWidth - kRight, axes.y(0), "denseline");
  std::vector<ParetoPoint> front;
  for (const ParetoPoint& point : data.points) {
    if (point.on_front && point.loss <= axes.loss_high) front.push_back(point);
  }
  out += path_of(axes, front, "front");
  for (std::size_t i = 0; i < names.size(); ++i) {
    out += draw_series(axes, data, names[i], static_cast<int>(i));
  }
  out += draw_marks(axes, data);
  out += draw_legend(data, names);
  return out + "</svg>\n";
}

std::string pareto_page(const ParetoData& data) {
  std::string rows;
  std::vector<ParetoPoint> points = data.points;
  std::stable_sort(points.begin(), points.end(),
                   [](const ParetoPoint& a, const ParetoPoint& b) { return a.bytes < b.bytes; });
  for (const ParetoPoint& point : points) {
    rows +=
        concat("<tr", point.on_front ? " class=\"front\"" : "", "><td>", escape_xml(point.label),
               "</td><td>", percent(point.bytes, 1, false), "</td><td>", escape_xml(point.value),
               "</td><td>", percent(point.loss, 2, true), "</td><td>",
               std::isfinite(point.half_width) ? "\u00b1 " + fixed(point.half_width * 100, 2) : "",
               "</td></tr>\n");
  }
  return concat(
      "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\"><head>"
      "<meta charset=\"utf-8\"/>"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>",
      escape_xml(data.title), "</title>\n<style>\n", css(), kPageCss, "</style></head>\n<body>",
      "<main>\n", draw_pareto(data, /*standalone=*/false),
      "<div class=\"wide\"><table>\n<tr><th>attention</th><th>", escape_xml(data.bytes_axis),
      "</th><th>measured</th><th>", escape_xml(data.loss_axis), "</th><th>95 %</th></tr>\n", rows,
      "</table></div>\n</main></body></html>\n");
}

}  // namespace twilight::app
