#ifndef TWILIGHT_SERVER_CONNECTION_H_
#define TWILIGHT_SERVER_CONNECTION_H_

#include <httplib.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <string>

namespace twilight::server {

/// Times that one connection is granted; they bound how long a slow client holds a thread.
struct ConnectionLimits {
  std::chrono::milliseconds idle{5000};    ///< for the next request to begin
  std::chrono::milliseconds read{30000};   ///< for a whole request to arrive, from its first byte
  std::chrono::milliseconds write{30000};  ///< for one piece of a response to be taken
  std::size_t header_bytes = 64 * 1024;    ///< request line and headers
};

/// An accepted socket as httplib reads and writes it, with deadlines. Owns the socket. Used by one
/// thread, but for `stop`.
class Connection final : public httplib::Stream {
 public:
  Connection(int fd, const ConnectionLimits& limits);
  ~Connection() override;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// Waits for the first byte of a request; false: none came in time, or `stop` was set.
  bool await_request(const std::atomic<bool>& stop);
  /// The headers are read; the byte limit on them is lifted.
  void headers_done() { in_headers_ = false; }
  /// The response is the last one of this connection.
  void close_after() { close_after_ = true; }
  [[nodiscard]] bool closes() const { return close_after_; }
  /// The client has closed its side.
  [[nodiscard]] bool client_gone() const;
  /// Ends the sending side and discards, for a moment, what the client still sends, so that it can
  /// read the response.
  void finish();

  /// The connection whose request this thread is serving.
  static Connection* current();
  void make_current(bool on);

  bool is_readable() const override;
  bool is_writable() const override;
  ssize_t read(char* ptr, size_t size) override;
  ssize_t write(const char* ptr, size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  socket_t socket() const override { return fd_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool wait(short events, Clock::time_point deadline) const;

  int fd_;
  ConnectionLimits limits_;
  std::array<char, 8192> buffer_{};
  std::size_t begin_ = 0, end_ = 0;
  Clock::time_point deadline_;
  std::size_t header_bytes_ = 0;
  bool in_headers_ = true;
  bool close_after_ = false;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_CONNECTION_H_
