#ifndef TWILIGHT_APPS_OUTPUT_H_
#define TWILIGHT_APPS_OUTPUT_H_

#include <string>
#include <string_view>

namespace twilight::app {

/// A file that a command will write at its end. Claimed before the long work starts, so a path that
/// exists or cannot be written is refused at once; nothing is ever overwritten unless `force`. The
/// content appears whole or not at all.
class OutputFile {
 public:
  OutputFile() = default;  ///< writes nowhere
  OutputFile(const std::string& path, bool force);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&& other) noexcept;

  [[nodiscard]] bool is_open() const { return !path_.empty(); }
  [[nodiscard]] const std::string& path() const { return path_; }
  /// Writes the content and puts the file in place. Throws Error(kIo).
  void commit(std::string_view content);

 private:
  std::string path_;
  std::string temporary_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_OUTPUT_H_
