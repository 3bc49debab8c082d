#ifndef TWILIGHT_APPS_PATHS_H_
#define TWILIGHT_APPS_PATHS_H_

#include <string>

namespace twilight::app {

/// The bundled model folder and novel: under $TWILIGHT_DATA, else share/twilight beside the
/// program, else the source tree it was built from. Throws Error(kNotFound) listing the places.
[[nodiscard]] std::string bundled_model();
[[nodiscard]] std::string bundled_novel();

/// Whole file as text; throws Error that names it.
[[nodiscard]] std::string read_text(const std::string& path);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_PATHS_H_
