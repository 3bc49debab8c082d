#ifndef TWILIGHT_APPS_INSPECT_PAGE_H_
#define TWILIGHT_APPS_INSPECT_PAGE_H_

#include <string>

#include "inspect_data.h"

namespace twilight::app {

/// A whole HTML page: headline, the picture with tooltips, the text coloured by what it took, and a
/// table of the layers. Needs nothing from outside itself and is well-formed XML as well.
[[nodiscard]] std::string draw_page(const InspectData& data);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_INSPECT_PAGE_H_
