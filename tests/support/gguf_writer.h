#ifndef TWILIGHT_TESTS_SUPPORT_GGUF_WRITER_H_
#define TWILIGHT_TESTS_SUPPORT_GGUF_WRITER_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace twilight::test {

template <typename T>
std::string gguf_bytes(T value) {
  std::string out(sizeof(T), '\0');
  std::memcpy(out.data(), &value, sizeof(T));
  return out;
}

inline std::string gguf_string(std::string_view text) {
  return gguf_bytes<std::uint64_t>(text.size()).append(text);
}

/// Puts a GGUF file of version 3 together, on a little-endian machine. Nothing is checked, so that
/// broken files can be made too.
class GgufWriter {
 public:
  std::uint32_t version = 3;
  std::uint64_t alignment = 32;

  /// A value of type number `type`, its bytes as the file holds them.
  void raw(std::string_view key, std::uint32_t type, std::string_view bytes) {
    pairs_ += gguf_string(key) + gguf_bytes(type);
    pairs_ += bytes;
    ++num_pairs_;
  }
  void u32(std::string_view key, std::uint32_t value) { raw(key, 4, gguf_bytes(value)); }
  void f32(std::string_view key, float value) { raw(key, 6, gguf_bytes(value)); }
  void boolean(std::string_view key, bool value) { raw(key, 7, std::string(1, value ? 1 : 0)); }
  void string(std::string_view key, std::string_view value) { raw(key, 8, gguf_string(value)); }
  void strings(std::string_view key, const std::vector<std::string>& values) {
    std::string bytes = gguf_bytes<std::uint32_t>(8) + gguf_bytes<std::uint64_t>(values.size());
    for (const auto& value : values) bytes += gguf_string(value);
    raw(key, 9, bytes);
  }
  template <typename T>
  void array(std::string_view key, std::uint32_t element, const std::vector<T>& values) {
    std::string bytes = gguf_bytes(element) + gguf_bytes<std::uint64_t>(values.size());
    for (const T value : values) bytes += gguf_bytes(value);
    raw(key, 9, bytes);
  }
  /// `sizes` in the file's order, the fastest axis first.
  void tensor(std::string_view name, std::uint32_t type, const std::vector<std::uint64_t>& sizes,
              std::string_view data) {
    data_.resize((data_.size() + alignment - 1) / alignment * alignment);
    tensor_at(name, type, sizes, data_.size());
    data_ += data;
  }
  void tensor_at(std::string_view name, std::uint32_t type, const std::vector<std::uint64_t>& sizes,
                 std::uint64_t offset) {
    tensors_ += gguf_string(name) + gguf_bytes(static_cast<std::uint32_t>(sizes.size()));
    for (const auto size : sizes) tensors_ += gguf_bytes(size);
    tensors_ += gguf_bytes(type) + gguf_bytes(offset);
    ++num_tensors_;
  }

  [[nodiscard]] std::string file() const {
    std::string out = "GGUF" + gguf_bytes(version) + gguf_bytes(num_tensors_) +
                      gguf_bytes(num_pairs_) + pairs_ + tensors_;
    if (num_tensors_ > 0) out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data_;
  }

 private:
  std::string pairs_, tensors_, data_;
  std::uint64_t num_pairs_ = 0, num_tensors_ = 0;
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_GGUF_WRITER_H_
