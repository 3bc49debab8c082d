#include "server/connection.h"

#include <netinet/tcp.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace twilight::server {
namespace {

// Unsent bytes the kernel may hold for one client; above that writes wait, so a reader that stalls
// is noticed.
constexpr int kSendBuffer = 64 * 1024;
constexpr std::chrono::milliseconds kStopPoll{100};
constexpr std::chrono::milliseconds kLinger{300};

thread_local Connection* current_connection = nullptr;

void address_of(const sockaddr_storage& address, socklen_t length, std::string& ip, int& port) {
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> service{};
  if (::getnameinfo(reinterpret_cast<const sockaddr*>(&address), length, host.data(), host.size(),
                    service.data(), service.size(), NI_NUMERICHOST | NI_NUMERICSERV) == 0) {
    ip = host.data();
    port = std::atoi(service.data());
  }
}

}  // namespace

Connection::Connection(int fd, const ConnectionLimits& limits) : fd_(fd), limits_(limits) {
  const int one = 1;
  ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  ::setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &kSendBuffer, sizeof kSendBuffer);
}

Connection::~Connection() { ::close(fd_); }

Connection* Connection::current() { return current_connection; }
void Connection::make_current(bool on) { current_connection = on ? this : nullptr; }

bool Connection::wait(short events, Clock::time_point deadline) const {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left < 0) return false;
    pollfd entry{fd_, events, 0};
    const int ready = ::poll(&entry, 1, static_cast<int>(std::min<long long>(left + 1, 1 << 30)));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return false;
  }
}

bool Connection::await_request(const std::atomic<bool>& stop) {
  const auto idle_end = Clock::now() + limits_.idle;
  header_bytes_ = 0;
  in_headers_ = true;
  for (;;) {
    if (stop || close_after_) return false;
    if (begin_ < end_) break;
    const auto step = std::min(idle_end, Clock::now() + kStopPoll);
    if (wait(POLLIN, step)) break;
    if (Clock::now() >= idle_end) return false;
  }
  deadline_ = Clock::now() + limits_.read;
  if (begin_ < end_) return true;
  char byte = 0;
  return ::recv(fd_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0;
}

bool Connection::client_gone() const {
  pollfd entry{fd_, POLLRDHUP, 0};
  return ::poll(&entry, 1, 0) > 0 && (entry.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

void Connection::finish() {
  ::shutdown(fd_, SHUT_WR);
  const auto deadline = Clock::now() + kLinger;
  std::array<char, 16384> scratch{};
  for (int rounds = 0; rounds < 256 && wait(POLLIN, deadline); ++rounds) {
    if (::recv(fd_, scratch.data(), scratch.size(), MSG_DONTWAIT) <= 0) return;
  }
}

bool Connection::is_readable() const { return begin_ < end_ || wait(POLLIN, deadline_); }

bool Connection::is_writable() const {
  return wait(POLLOUT, Clock::now() + limits_.write) && !client_gone();
}

ssize_t Connection::read(char* ptr, size_t size) {
  if (begin_ == end_) {
    if (!wait(POLLIN, deadline_)) return -1;
    ssize_t got = 0;
    do {
      got = ::recv(fd_, buffer_.data(), buffer_.size(), 0);
    } while (got < 0 && errno == EINTR);
    if (got <= 0) return got;
    begin_ = 0;
    end_ = static_cast<std::size_t>(got);
  }
  const std::size_t take = std::min(size, end_ - begin_);
  if (in_headers_) {
    header_bytes_ += take;
    if (header_bytes_ > limits_.header_bytes) return -1;
  }
  std::memcpy(ptr, buffer_.data() + begin_, take);
  begin_ += take;
  return static_cast<ssize_t>(take);
}

ssize_t Connection::write(const char* ptr, size_t size) {
  const auto deadline = Clock::now() + limits_.write;
  std::size_t done = 0;
  while (done < size) {
    const ssize_t sent = ::send(fd_, ptr + done, size - done, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      done += static_cast<std::size_t>(sent);
    } else if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (!wait(POLLOUT, deadline)) break;
    } else if (!(sent < 0 && errno == EINTR)) {
      break;
    }
  }
  if (done == size) return static_cast<ssize_t>(size);
  close_after_ = true;
  return -1;
}

void Connection::get_remote_ip_and_port(std::string& ip, int& port) const {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (::getpeername(fd_, reinterpret_cast<sockaddr*>(&address), &length) == 0) {
    address_of(address, length, ip, port);
  }
}

void Connection::get_local_ip_and_port(std::string& ip, int& port) const {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &length) == 0) {
    address_of(address, length, ip, port);
  }
}

}  // namespace twilight::server
