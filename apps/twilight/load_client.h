#ifndef TWILIGHT_APPS_LOAD_CLIENT_H_
#define TWILIGHT_APPS_LOAD_CLIENT_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "load_stats.h"

namespace httplib {
class Client;
}

namespace twilight::app {

/// An OpenAI server by its address.
class LoadClient {
 public:
  using Clock = std::chrono::steady_clock;

  /// `url`: http://HOST[:PORT]; the paths are added. Throws Error(kInvalidArgument).
  LoadClient(std::string url, std::string api_key, double timeout_seconds);
  ~LoadClient();
  LoadClient(const LoadClient&) = delete;
  LoadClient& operator=(const LoadClient&) = delete;

  /// Fields of the request beside prompt and max_tokens, e.g. the attention to use.
  struct Extra {
    std::string attention;  ///< empty: the server's own
    std::string model;      ///< empty: not named
  };
  /// Streams one completion, greedily and past end tokens, and says what was seen; never throws for
  /// what the server does. `start` is the run's start.
  [[nodiscard]] LoadResult complete(const LoadRequest& request,
                                    const std::vector<std::int32_t>& prompt, const Extra& extra,
                                    Clock::time_point start);
  /// Ends every request under way and refuses further ones; their results are cut.
  void cut();

  /// The first model that /v1/models lists: id and max_model_len (0: not said). Throws
  /// Error(kIo) where there is no such server.
  struct ModelEntry {
    std::string id;
    std::int64_t context = 0;
  };
  [[nodiscard]] ModelEntry model();
  /// Values of /metrics without labels, by name; empty where there are none.
  [[nodiscard]] std::map<std::string, double> metrics();

  [[nodiscard]] const std::string& url() const { return url_; }

 private:
  [[nodiscard]] std::unique_ptr<httplib::Client> connect() const;
  [[nodiscard]] bool enter(httplib::Client* client);
  void leave(httplib::Client* client);
  [[nodiscard]] bool is_cut();

  std::string url_, api_key_;
  double timeout_;
  std::mutex mutex_;
  bool cut_ = false;
  std::set<httplib::Client*> open_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_LOAD_CLIENT_H_
