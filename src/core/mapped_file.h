#ifndef TWILIGHT_CORE_MAPPED_FILE_H_
#define TWILIGHT_CORE_MAPPED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace twilight {

/// A whole file mapped read-only. Move-only; the mapping lives as long as the object. Throws
/// Error(kNotFound / kIo) that names the path. An empty file gives an empty span.
///
/// Renaming another file over the path, or removing it, leaves the mapping and its bytes alone.
/// Writing into the mapped file itself may change the bytes, and shortening it makes access past
/// its new end a fault of the process.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }
  [[nodiscard]] const std::string& path() const { return path_; }
  /// Throws Error(kIo) where the path still names the mapped file, but its size or its time of
  /// modification has changed since it was mapped.
  void check_unchanged() const;

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  // What stat said when it was mapped; nanoseconds since the epoch.
  std::uint64_t device_ = 0;
  std::uint64_t inode_ = 0;
  std::int64_t modified_ = 0;
};

/// Reads a whole text file into memory; throws like `MappedFile`.
[[nodiscard]] std::string read_text_file(const std::string& path);

}  // namespace twilight

#endif  // TWILIGHT_CORE_MAPPED_FILE_H_
