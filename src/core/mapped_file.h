#ifndef TWILIGHT_CORE_MAPPED_FILE_H_
#define TWILIGHT_CORE_MAPPED_FILE_H_

#include <cstddef>
#include <span>
#include <string>

namespace twilight {

/// A whole file mapped read-only. Move-only; the mapping lives as long as the object. Throws
/// Error(kNotFound / kIo) that names the path. An empty file gives an empty span.
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

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Reads a whole text file into memory; throws like `MappedFile`.
[[nodiscard]] std::string read_text_file(const std::string& path);

}  // namespace twilight

#endif  // TWILIGHT_CORE_MAPPED_FILE_H_
