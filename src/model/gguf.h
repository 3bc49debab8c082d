#ifndef TWILIGHT_MODEL_GGUF_H_
#define TWILIGHT_MODEL_GGUF_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/mapped_file.h"
#include "quant/weight_blocks.h"

namespace twilight {

/// Types of metadata values, by their number in the file.
enum class GgufType : std::uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

/// A metadata value where it lies in the file, its extent checked. `bytes` holds the value; of a
/// string its text; of an array its `count` elements one after another (strings and arrays with
/// their own headers).
struct GgufValue {
  GgufType type = GgufType::kU8;
  GgufType element = GgufType::kU8;  ///< of an array
  std::uint64_t count = 0;           ///< of an array
  std::span<const std::byte> bytes;

  /// The value for messages: one printable line, an array by its size.
  [[nodiscard]] std::string shown() const;
};

struct GgufTensor {
  std::string name;
  std::uint32_t type_number = 0;
  std::optional<WeightType> type;   ///< absent for types that are not read
  std::vector<std::int64_t> shape;  ///< slowest axis first: the reverse of the file's order
  std::int64_t begin = 0;           ///< bytes from the file's start
  std::int64_t bytes = 0;           ///< 0 where the type is not read
};

/// Name of a tensor type number, "IQ4_XS"; "type 77" where it is unknown.
[[nodiscard]] std::string gguf_tensor_type_name(std::uint32_t number);

/// Header of a GGUF file: views into the bytes it was parsed from.
struct GgufHeader {
  std::uint32_t version = 0;
  std::uint64_t alignment = 0;  ///< of tensor data, bytes
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::vector<GgufTensor> tensors;  ///< in order of position
};

/// Checks the whole header of a little-endian GGUF file of version 2 or 3: magic, counts against
/// what the file can hold, every string, array and value inside the file, keys and tensor names
/// given once, alignment, shapes whose rows are whole blocks, and tensor data aligned, inside the
/// file and without overlap. A tensor type that is not read is no error here. `path` is only quoted
/// in errors, which are Error(kInvalidFile / kUnsupported) `[gguf] path: field, got VALUE, accepted
/// SET`. What it allocates is bounded by a small multiple of the file's size.
[[nodiscard]] GgufHeader parse_gguf(std::span<const std::byte> file, const std::string& path);

/// A mapped GGUF file with typed access to its metadata. A key that is absent is missing; a value
/// of another type or out of range is Error(kInvalidFile) as above. Safe to read from several
/// threads; views live as long as it does.
class GgufFile {
 public:
  /// Throws Error(kNotFound / kIo) for a file that cannot be read, else as `parse_gguf`.
  explicit GgufFile(const std::string& path);
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  [[nodiscard]] const std::string& path() const { return file_.path(); }
  [[nodiscard]] std::uint32_t version() const { return header_.version; }
  [[nodiscard]] const std::vector<GgufTensor>& tensors() const { return header_.tensors; }
  [[nodiscard]] std::span<const std::byte> bytes() const { return file_.bytes(); }
  [[nodiscard]] const MappedFile& file() const { return file_; }

  [[nodiscard]] bool has(std::string_view key) const { return find(key) != nullptr; }
  /// Integers of any width in [low, high].
  [[nodiscard]] std::int64_t integer(std::string_view key, std::int64_t low,
                                     std::int64_t high) const;
  [[nodiscard]] std::int64_t integer_or(std::string_view key, std::int64_t low, std::int64_t high,
                                        std::int64_t missing) const;
  /// Finite numbers in [low, high]; integers count as numbers.
  [[nodiscard]] double number(std::string_view key, double low, double high) const;
  [[nodiscard]] double number_or(std::string_view key, double low, double high,
                                 double missing) const;
  [[nodiscard]] bool boolean_or(std::string_view key, bool missing) const;
  [[nodiscard]] std::optional<std::string_view> string(std::string_view key) const;
  /// A list of strings; empty where the key is missing.
  [[nodiscard]] std::vector<std::string_view> strings(std::string_view key) const;
  /// A list of 32-bit floats; empty where the key is missing.
  [[nodiscard]] std::vector<float> floats(std::string_view key) const;
  /// A list of integers in [low, high]; empty where the key is missing.
  [[nodiscard]] std::vector<std::int32_t> integers(std::string_view key, std::int32_t low,
                                                   std::int32_t high) const;

  /// Throws the error for `key` with the value it holds.
  [[noreturn]] void reject(std::string_view key, std::string_view accepted) const;
  /// The same as Error(kUnsupported).
  [[noreturn]] void unsupported(std::string_view key, std::string_view accepted) const;

 private:
  [[nodiscard]] const GgufValue* find(std::string_view key) const;
  [[nodiscard]] std::string complaint(std::string_view key, std::string_view accepted) const;
  [[nodiscard]] const GgufValue* find_array(std::string_view key, std::string_view accepted) const;

  MappedFile file_;
  GgufHeader header_;
};

/// The file that `path` means: itself where it is a regular file, the only *.gguf of a folder
/// without config.json, else nothing (a Hugging Face folder, or no such path). Throws
/// Error(kInvalidFile) for a folder without config.json and several of them.
[[nodiscard]] std::optional<std::string> find_gguf(const std::string& path);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_GGUF_H_
