#include "server/http_server.h"

#include <netdb.h>
#include <poll.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string_view>
#include <system_error>

#include "twilight/error.h"

namespace twilight::server {
namespace {

constexpr int kAcceptPollMs = 100;
constexpr int kBacklog = 512;
constexpr std::string_view kBusy =
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    "Connection: close\r\nContent-Length: 111\r\n\r\n"
    R"({"error":{"message":"too many connections","type":"server_error","param":null,"code":"too_many_connections"}})"
    "\r\n";
static_assert(kBusy.substr(kBusy.find("\r\n\r\n") + 4).size() == 111);

[[noreturn]] void cannot_listen(const HttpOptions& options, const std::string& reason) {
  throw Error(ErrorCode::kIo, "[serve] cannot listen on " + options.host + ":" +
                                  std::to_string(options.port) + ": " + reason);
}

int listen_on(const HttpOptions& options) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      ::getaddrinfo(options.host.c_str(), std::to_string(options.port).c_str(), &hints, &found);
  if (error != 0) cannot_listen(options, ::gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
  std::string reason = "no address";
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    const int fd = ::socket(each->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
      reason = std::strerror(errno);
      continue;
    }
    const int one = 1;
    ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (::bind(fd, each->ai_addr, each->ai_addrlen) == 0 && ::listen(fd, kBacklog) == 0) return fd;
    reason = std::strerror(errno);
    ::close(fd);
  }
  cannot_listen(options, reason);
}

int port_of(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port
                   : reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
}

}  // namespace

HttpServer::HttpServer(HttpOptions options) : options_(std::move(options)) {}

HttpServer::~HttpServer() { stop(); }

void HttpServer::start() {
  listener_ = listen_on(options_);
  port_ = port_of(listener_);
  svr_sock_ = listener_;  // httplib ends streams where it has no socket
  acceptor_ = std::thread([this] { accept_loop(); });
}

void HttpServer::stop() {
  stopping_ = true;
  if (acceptor_.joinable()) acceptor_.join();
  {
    const std::lock_guard lock(mutex_);
    for (const int fd : waiting_) ::close(fd);
    waiting_.clear();
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  if (listener_ >= 0) ::close(listener_);
  listener_ = -1;
  svr_sock_ = INVALID_SOCKET;
}

void HttpServer::accept_loop() {
  while (!stopping_) {
    pollfd entry{listener_, POLLIN, 0};
    if (::poll(&entry, 1, kAcceptPollMs) <= 0) continue;
    const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) {
      // Out of descriptors: the connection stays in the backlog until one is free.
      if (errno == EMFILE || errno == ENFILE) ::poll(nullptr, 0, kAcceptPollMs);
      continue;
    }
    bool taken = false;
    {
      const std::lock_guard lock(mutex_);
      const bool idle = static_cast<int>(waiting_.size()) < idle_;
      if (!idle && static_cast<int>(workers_.size()) < options_.max_connections) {
        try {
          workers_.emplace_back([this] { work(); });
          taken = true;
        } catch (const std::system_error&) {  // no more threads: as if at the limit
        }
      }
      taken = taken || idle;
      if (taken) waiting_.push_back(fd);
    }
    if (taken) {
      wake_.notify_one();
    } else {
      [[maybe_unused]] const auto sent =
          ::send(fd, kBusy.data(), kBusy.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      ::shutdown(fd, SHUT_WR);
      ::close(fd);
    }
  }
}

void HttpServer::work() {
  for (;;) {
    int fd = -1;
    {
      std::unique_lock lock(mutex_);
      ++idle_;
      wake_.wait(lock, [&] { return stopping_ || !waiting_.empty(); });
      --idle_;
      if (waiting_.empty()) return;
      fd = waiting_.front();
      waiting_.pop_front();
    }
    ++active_;
    serve(fd);
    --active_;
  }
}

void HttpServer::serve(int fd) {
  Connection connection(fd, options_.limits);
  connection.make_current(true);
  bool served = false;
  while (connection.await_request(stopping_)) {
    bool closed = false;
    served = true;
    const bool ok = process_request(connection, connection.closes() || stopping_, closed,
                                    [&](httplib::Request& request) {
                                      connection.headers_done();
                                      request.ranges.clear();  // responses are never in parts
                                    });
    if (!ok || closed || connection.closes()) break;
  }
  connection.make_current(false);
  if (served) connection.finish();
}

}  // namespace twilight::server
