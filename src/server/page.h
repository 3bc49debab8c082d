#ifndef TWILIGHT_SERVER_PAGE_H_
#define TWILIGHT_SERVER_PAGE_H_

#include <string_view>

namespace twilight::server {

/// The page at `/`: src/server/page/index.html.
extern const std::string_view kPage;

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_PAGE_H_
