#include "journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "twilight/error.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

[[noreturn]] void io_error(const char* what, const std::string& path) {
  throw Error(ErrorCode::kIo, std::string("[--resume] cannot ") + what + " file " + path + ": " +
                                  std::strerror(errno));
}

std::string read_all(int file, const std::string& path) {
  std::string content;
  std::vector<char> buffer(1 << 20);
  for (;;) {
    const ssize_t got = ::read(file, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) io_error("read", path);
    if (got == 0) return content;
    content.append(buffer.data(), static_cast<std::size_t>(got));
  }
}

struct Difference {
  std::string name;  // of a field inside an object: "object.field"
  std::string ours, file;
};

std::string shown(const Json& object, const std::string& name) {
  if (!object.contains(name)) return "none";
  std::string text = object[name].dump();
  constexpr std::size_t kLongest = 160;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return text;
}

// The settings that differ, in the order of `ours`; those only the file has come last.
void find_differences(const Json& ours, const Json& file, const std::string& prefix,
                      const std::vector<std::string>& free_fields, std::vector<Difference>& out) {
  const auto visit = [&](const std::string& name) {
    const std::string full = prefix + name;
    if (std::find(free_fields.begin(), free_fields.end(), full) != free_fields.end()) return;
    const bool both = ours.contains(name) && file.contains(name);
    if (both && ours[name] == file[name]) return;
    if (both && ours[name].is_object() && file[name].is_object()) {
      find_differences(ours[name], file[name], full + ".", free_fields, out);
    } else {
      out.push_back({full, shown(ours, name), shown(file, name)});
    }
  };
  for (const auto& [name, value] : ours.items()) visit(name);
  for (const auto& [name, value] : file.items()) {
    if (!ours.contains(name)) visit(name);
  }
}

}  // namespace

Journal::Journal(const std::string& path, const Json& settings,
                 const std::vector<std::string>& free_fields)
    : path_(path) {
  file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file_ < 0) io_error("open", path);
  try {
    if (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
      throw Error(ErrorCode::kInvalidArgument, "[--resume] file in use by another run, got " +
                                                   path + ", accepted a file of its own");
    }
    load(settings, free_fields);
  } catch (...) {
    ::close(file_);
    file_ = -1;
    throw;
  }
}

void Journal::load(const Json& settings, const std::vector<std::string>& free_fields) {
  const std::string content = read_all(file_, path_);
  const std::size_t last = content.rfind('\n');
  const std::size_t whole = last == std::string::npos ? 0 : last + 1;
  const auto not_ours = [&] {
    return Error(ErrorCode::kInvalidArgument, "[--resume] kind of file, got " + path_ +
                                                  ", accepted a file that --resume wrote, or a "
                                                  "new path");
  };
  bool first = true;
  for (std::size_t at = 0; at < whole;) {
    const std::size_t end = content.find('\n', at);
    const Json line = Json::parse(content.begin() + static_cast<std::ptrdiff_t>(at),
                                  content.begin() + static_cast<std::ptrdiff_t>(end), nullptr,
                                  /*allow_exceptions=*/false);
    at = end + 1;
    if (!line.is_object() || !line.contains(first ? "settings" : "key") ||
        (!first && !line.contains("value"))) {
      throw not_ours();
    }
    if (first) {
      const Json ours = Json::parse(settings.dump());  // numbers as a file holds them
      std::vector<Difference> found;
      find_differences(ours, line["settings"], "", free_fields, found);
      if (!found.empty()) {
        std::string others;
        for (std::size_t i = 1; i < found.size(); ++i) {
          others += (i == 1 ? "" : ", ") + found[i].name;
        }
        const Difference& one = found.front();
        throw Error(ErrorCode::kInvalidArgument,
                    "[--resume] settings other than those of " + path_ + ": " + one.name +
                        ", got " + one.ours + ", accepted " + one.file + " as in the file" +
                        (others.empty() ? "" : " (also: " + others + ")"));
      }
      first = false;
    } else {
      pieces_[line["key"].get<std::string>()] = line["value"];
    }
  }
  // A file without one whole line is new, or was cut off in its first; any other is not ours.
  if (first && !content.empty() && !content.starts_with("{\"settings\":")) throw not_ours();
  if (whole < content.size() && ::ftruncate(file_, static_cast<off_t>(whole)) != 0) {
    io_error("write", path_);
  }
  if (first) append(Json{{"settings", settings}}.dump());
}

void Journal::append(const std::string& line) {
  const std::string whole = line + "\n";
  std::string_view rest = whole;
  while (!rest.empty()) {
    const ssize_t written = ::write(file_, rest.data(), rest.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) io_error("write", path_);
    rest.remove_prefix(static_cast<std::size_t>(written));
  }
}

Journal::~Journal() {
  if (file_ >= 0) ::close(file_);
}

Journal::Journal(Journal&& other) noexcept
    : path_(std::exchange(other.path_, {})),
      file_(std::exchange(other.file_, -1)),
      pieces_(std::move(other.pieces_)) {}

Journal& Journal::operator=(Journal&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_, other.file_);
  std::swap(pieces_, other.pieces_);
  return *this;
}

const Json* Journal::find(const std::string& key) const {
  const auto it = pieces_.find(key);
  return it == pieces_.end() ? nullptr : &it->second;
}

void Journal::add(const std::string& key, Json value) {
  if (file_ >= 0) append(Json{{"key", key}, {"value", value}}.dump());
  pieces_[key] = std::move(value);
}

}  // namespace twilight::app
