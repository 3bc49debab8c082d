#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "server/http_server.h"

namespace {

using twilight::server::HttpOptions;
using twilight::server::HttpServer;

class Server {
 public:
  Server() : http_(options()) {
    http_.Get("/", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("hello", "text/plain");
    });
    http_.Post("/echo", [](const httplib::Request& request, httplib::Response& response) {
      response.set_content(request.body, "application/octet-stream");
    });
    http_.start();
  }
  ~Server() { http_.stop(); }

  /// Sends the bytes and closes that side; everything the server answers until it closes its own.
  [[nodiscard]] std::string exchange(std::string_view bytes) const {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<std::uint16_t>(http_.port()));
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      __builtin_trap();
    }
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) break;  // refused before it was read to its end
      bytes.remove_prefix(static_cast<std::size_t>(sent));
    }
    ::shutdown(fd, SHUT_WR);
    std::string answer;
    char buffer[4096];
    for (ssize_t got; (got = ::recv(fd, buffer, sizeof buffer, 0)) > 0;) {
      answer.append(buffer, static_cast<std::size_t>(got));
    }
    ::close(fd);
    return answer;
  }

 private:
  static HttpOptions options() {
    HttpOptions options;
    options.port = 0;
    return options;
  }
  HttpServer http_;
};

}  // namespace

// What a connection sends, from arbitrary bytes: nothing or an HTTP answer comes back, and the next
// client is served.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Server kServer;
  const std::string answer = kServer.exchange({reinterpret_cast<const char*>(data), size});
  if (!answer.empty() && answer.rfind("HTTP/1.", 0) != 0) __builtin_trap();
  static std::uint64_t inputs = 0;
  if (++inputs % 64 == 0) {
    const std::string hello =
        kServer.exchange("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    if (hello.rfind("HTTP/1.1 200", 0) != 0 || hello.find("hello") == std::string::npos) {
      __builtin_trap();
    }
  }
  return 0;
}
