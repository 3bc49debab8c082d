#ifndef TWILIGHT_APPS_LOAD_RUN_H_
#define TWILIGHT_APPS_LOAD_RUN_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "load_client.h"
#include "load_plan.h"
#include "load_stats.h"

namespace twilight::app {

struct LoadLimits {
  std::int32_t streams = 0;   ///< requests under way, each followed by the next; 0: as they arrive
  std::int64_t requests = 0;  ///< to send; 0: any number
  double duration = 0;        ///< seconds after which none is sent; 0: any time
  double drain = 60;          ///< seconds that running requests then have before they are cut
};

/// Sends requests to a server and waits for their ends. Ctrl-C cuts what runs. `progress` is called
/// a few times a second with the requests that have ended and the seconds since the start.
[[nodiscard]] std::vector<LoadResult> run_load(
    LoadClient& client, LoadSource source, const LoadText& text,
    const std::vector<std::int32_t>& mark, const LoadClient::Extra& extra, const LoadLimits& limits,
    const std::function<void(std::int64_t, double)>& progress);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LOAD_RUN_H_
