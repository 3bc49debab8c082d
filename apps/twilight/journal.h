#ifndef TWILIGHT_APPS_JOURNAL_H_
#define TWILIGHT_APPS_JOURNAL_H_

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace twilight::app {

/// Finished pieces of a long evaluation, one JSON line each, so that a run that was cut off goes on
/// where it stopped. The first line holds the settings, all others `{"key": ..., "value": ...}`. A
/// line is written whole as its piece finishes; a half line at the end of the file, from a run that
/// was killed while writing, is dropped. One process at a time.
class Journal {
 public:
  /// Keeps pieces in memory only.
  Journal() = default;
  /// Opens or makes the file. Throws Error(kInvalidArgument) where it was made with other settings
  /// (naming the first that differs), is no such file, or is in use, and Error(kIo) where it cannot
  /// be read or written. Fields named in `free_fields` may differ from the file's.
  Journal(const std::string& path, const nlohmann::ordered_json& settings,
          const std::vector<std::string>& free_fields);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;
  Journal(Journal&& other) noexcept;
  Journal& operator=(Journal&& other) noexcept;

  /// The piece of that name, or null.
  [[nodiscard]] const nlohmann::ordered_json* find(const std::string& key) const;
  /// Keeps a piece; throws Error(kIo) where it cannot be written.
  void add(const std::string& key, nlohmann::ordered_json value);
  [[nodiscard]] std::size_t size() const { return pieces_.size(); }

 private:
  void load(const nlohmann::ordered_json& settings, const std::vector<std::string>& free_fields);
  void append(const std::string& line);

  std::string path_;
  int file_ = -1;
  std::map<std::string, nlohmann::ordered_json> pieces_;
};

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_JOURNAL_H_
