#ifndef TWILIGHT_APPS_INSPECT_PICTURE_H_
#define TWILIGHT_APPS_INSPECT_PICTURE_H_

#include <string>
#include <utility>
#include <vector>

#include "heatmap.h"
#include "inspect_data.h"
#include "layer_strip.h"

namespace twilight::app {

/// One heat map of the picture with what a tooltip needs to find a cell.
struct PictureMap {
  HeatGrid grid;
  HeatLayout layout;
  ValueAxis axis;  ///< of the colours
};

/// The picture of a generation: kept tokens of every layer, head and step, their distribution in
/// each layer, and the kept mass. An SVG element that follows the light or dark scheme.
struct Picture {
  std::string svg;
  PictureMap kept, mass;  ///< grids without columns where nothing was drawn
};

struct PictureOptions {
  bool standalone = true;  ///< a file of its own: headline figures, style and row titles inside
};

/// Data of any size, without steps or layers too. Steps of a layer must have the lengths that
/// InspectData gives.
[[nodiscard]] Picture draw_picture(const InspectData& data, const PictureOptions& options);

/// Style rules that the picture needs, for a page that embeds one.
[[nodiscard]] std::string picture_css();

/// Name and value of the figures above a picture: context, preset, bytes read, means.
[[nodiscard]] std::vector<std::pair<std::string, std::string>> headline_figures(
    const InspectData& data);

/// "estimated" or "true", as the masses of the data are.
[[nodiscard]] std::string mass_kind(const InspectData& data);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_INSPECT_PICTURE_H_
