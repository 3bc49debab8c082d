#ifndef TWILIGHT_APPS_INSPECT_PANELS_H_
#define TWILIGHT_APPS_INSPECT_PANELS_H_

#include <string>
#include <utility>
#include <vector>

#include "inspect_picture.h"

/// Parts of the picture of a generation, as SVG: labels of a map, the panels beside it, what a
/// viewer shows under the pointer.
namespace twilight::app {

// Pixels.
inline constexpr double kMargin = 28, kGutter = 104, kPlotWidth = 768, kPanelGap = 46,
                        kPanelWidth = 226;
inline constexpr double kPlotX = kMargin + kGutter;
inline constexpr double kNarrowestPlot = 420;

[[nodiscard]] std::string text_at(double x, double y, const char* classes, const std::string& text,
                                  const char* extra = "");
[[nodiscard]] std::string per_cent(double share);
[[nodiscard]] std::string mass_text(double mass);
/// Smallest and largest kept count of the sparse steps; {0, 0} without one.
[[nodiscard]] std::pair<double, double> kept_range(const InspectData& data);
/// Where the colours of masses begin: a twentieth, or the one below the least mass.
[[nodiscard]] double mass_floor(const InspectData& data);

/// First row and pixel span of a layer of a map.
struct LayerBlock {
  std::int32_t layer;
  bool dense;
  std::size_t first, end;
  double y, height;
};
[[nodiscard]] std::vector<LayerBlock> blocks_of(const PictureMap& map);
[[nodiscard]] std::string row_labels(const InspectData& data, const PictureMap& map);
[[nodiscard]] std::string column_labels(const InspectData& data, const PictureMap& map,
                                        bool tokens);
/// Colour bar over the axis of the right panel, its ticks and thin lines down along the map.
[[nodiscard]] std::string panel_axis(const PictureMap& map, const char* prefix, double colour_end,
                                     const std::string& title, bool decimals);
[[nodiscard]] std::string diamond(double x, double y, double r);
[[nodiscard]] std::string triangle(double x, double y, double r);
[[nodiscard]] std::string kept_panel(const InspectData& data, const PictureMap& map);
[[nodiscard]] std::string mass_panel(const InspectData& data, const PictureMap& map);
/// Invisible rows over a map, so that a viewer shows what the pointer is on.
[[nodiscard]] std::string row_titles(const InspectData& data, const PictureMap& map, bool mass);
/// A transparent rectangle and a cursor for the script of a page.
[[nodiscard]] std::string hit_area(const PictureMap& map, const std::string& id);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_INSPECT_PANELS_H_
