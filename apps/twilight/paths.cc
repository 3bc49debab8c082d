#include "paths.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "twilight/error.h"

namespace twilight::app {
namespace {

namespace fs = std::filesystem;

std::string find_bundled(const std::string& relative) {
  std::vector<fs::path> roots;
  if (const char* data = std::getenv("TWILIGHT_DATA"); data != nullptr) roots.emplace_back(data);
  std::error_code ignored;
  const fs::path program = fs::read_symlink("/proc/self/exe", ignored);
  if (!program.empty()) roots.push_back(program.parent_path().parent_path() / "share" / "twilight");
  roots.emplace_back(TWILIGHT_SOURCE_DIR);
  std::string tried;
  for (const fs::path& root : roots) {
    const fs::path path = root / relative;
    if (fs::exists(path, ignored)) return path.string();
    tried += (tried.empty() ? "" : ", ") + path.string();
  }
  throw Error(ErrorCode::kNotFound, "[data] bundled file not found, tried " + tried +
                                        "; set TWILIGHT_DATA to the folder that holds " + relative);
}

}  // namespace

std::string bundled_model() { return find_bundled("models/vesper-19m"); }
std::string bundled_novel() { return find_bundled("data/Persuasion.txt"); }

std::string read_text(const std::string& path) {
  std::error_code ignored;
  std::ifstream file(path, std::ios::binary);
  if (!file || fs::is_directory(path, ignored)) {
    const bool missing = !fs::exists(path, ignored);
    throw Error(missing ? ErrorCode::kNotFound : ErrorCode::kIo,
                "[open] cannot read file " + path + ": " +
                    (missing ? "No such file or directory"
                             : (fs::is_directory(path, ignored) ? "Is a directory"
                                                                : std::strerror(errno))));
  }
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace twilight::app
