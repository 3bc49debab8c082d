#ifndef TWILIGHT_SERVER_HTTP_SERVER_H_
#define TWILIGHT_SERVER_HTTP_SERVER_H_

#include <httplib.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/connection.h"

namespace twilight::server {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;  ///< 0: any free one
  /// Connections served at once, a thread each; one more is answered with 503.
  int max_connections = 256;
  ConnectionLimits limits;
};

/// httplib's parsing, routing and responses over sockets of our own: a listener, a thread for every
/// connection up to a limit, deadlines for whole requests. Routes are added before `start`.
class HttpServer final : public httplib::Server {
 public:
  explicit HttpServer(HttpOptions options);
  ~HttpServer() override;

  /// Binds and begins to accept. Throws Error(kIo) where the address cannot be had.
  void start();
  /// The port in use.
  [[nodiscard]] int port() const { return port_; }
  /// Closes the listener, lets requests in progress end, joins all threads.
  void stop();
  [[nodiscard]] int connections() const { return active_; }

 private:
  void accept_loop();
  void work();
  void serve(int fd);

  HttpOptions options_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  std::atomic<int> active_{0};
  std::thread acceptor_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<int> waiting_;
  std::vector<std::thread> workers_;
  int idle_ = 0;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_HTTP_SERVER_H_
