#ifndef TWILIGHT_TESTS_SUPPORT_SAFETENSORS_WRITER_H_
#define TWILIGHT_TESTS_SUPPORT_SAFETENSORS_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace twilight::test {

/// A file of the format from any header text: eight bytes of little-endian length, header, data.
inline std::string safetensors_file(const std::string& header, const std::string& data) {
  std::string out;
  for (int i = 0; i < 8; ++i) {
    out += static_cast<char>((static_cast<std::uint64_t>(header.size()) >> (8 * i)) & 0xffU);
  }
  return out + header + data;
}

/// Collects tensors and writes a well-formed file of them.
class SafetensorsWriter {
 public:
  void add(const std::string& name, const std::string& dtype,
           const std::vector<std::int64_t>& shape, const std::string& bytes) {
    header_ += header_.empty() ? "{\"" : ",\"";
    header_.append(name).append("\":{\"dtype\":\"").append(dtype).append("\",\"shape\":[");
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (i != 0) header_ += ',';
      header_ += std::to_string(shape[i]);
    }
    header_.append("],\"data_offsets\":[").append(std::to_string(data_.size()));
    header_.append(",").append(std::to_string(data_.size() + bytes.size())).append("]}");
    data_ += bytes;
  }
  /// `padding` spaces after the header move the data off its alignment.
  [[nodiscard]] std::string file(int padding = 0) const {
    return safetensors_file((header_.empty() ? "{" : header_) + '}' +
                                std::string(static_cast<std::size_t>(padding), ' '),
                            data_);
  }

 private:
  std::string header_;
  std::string data_;
};

}  // namespace twilight::test

#endif  // TWILIGHT_TESTS_SUPPORT_SAFETENSORS_WRITER_H_
