#include "output.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "twilight/error.h"

namespace twilight::app {

OutputFile::OutputFile(const std::string& path, bool force) : path_(path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (fs::exists(path, ignored) && !force) {
    throw Error(ErrorCode::kInvalidArgument, "[output] file exists, got " + path +
                                                 ", accepted a new path, or --force to replace it");
  }
  temporary_ = path + ".partial";
  const int fd = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0 || fs::is_directory(path, ignored)) {
    const std::string reason = fd < 0 ? std::strerror(errno) : "Is a directory";
    if (fd >= 0) {
      ::close(fd);
      ::unlink(temporary_.c_str());
    }
    path_.clear();
    temporary_.clear();
    throw Error(ErrorCode::kIo, "[output] cannot write file " + path + ": " + reason);
  }
  ::close(fd);
}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::exchange(other.path_, {})), temporary_(std::exchange(other.temporary_, {})) {}

OutputFile& OutputFile::operator=(OutputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(temporary_, other.temporary_);
  return *this;
}

void OutputFile::commit(std::string_view content) {
  if (!is_open()) return;
  const int fd = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  bool ok = fd >= 0;
  while (ok && !content.empty()) {
    const ssize_t written = ::write(fd, content.data(), content.size());
    if (written < 0 && errno == EINTR) continue;
    ok = written > 0;
    if (ok) content.remove_prefix(static_cast<std::size_t>(written));
  }
  int code = ok ? 0 : errno;
  if (fd >= 0 && ::close(fd) != 0 && ok) {
    ok = false;
    code = errno;
  }
  if (ok && ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    ok = false;
    code = errno;
  }
  if (!ok) {
    throw Error(ErrorCode::kIo, "[output] cannot write file " + path_ + ": " + std::strerror(code));
  }
  temporary_.clear();
}

}  // namespace twilight::app
