#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>

#include "core/check.h"
#include "model/gguf.h"
#include "model/gguf_scalar.h"
#include "model/json_reader.h"

namespace twilight {
namespace {

// An integer of any width; u64 values past int64 come out as its largest value.
std::optional<std::int64_t> load_integer(GgufType type, std::span<const std::byte> bytes) {
  const std::uint64_t bits = load_little(bytes);
  switch (type) {
    case GgufType::kU8:
    case GgufType::kU16:
    case GgufType::kU32:
    case GgufType::kU64:
      return static_cast<std::int64_t>(std::min<std::uint64_t>(
          bits, static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())));
    case GgufType::kI8:
      return static_cast<std::int8_t>(bits);
    case GgufType::kI16:
      return static_cast<std::int16_t>(bits);
    case GgufType::kI32:
      return static_cast<std::int32_t>(bits);
    case GgufType::kI64:
      return static_cast<std::int64_t>(bits);
    default:
      return std::nullopt;
  }
}

std::optional<double> load_number(GgufType type, std::span<const std::byte> bytes) {
  if (type == GgufType::kF32) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(load_little(bytes)));
  }
  if (type == GgufType::kF64) return std::bit_cast<double>(load_little(bytes));
  if (const auto integer = load_integer(type, bytes)) return static_cast<double>(*integer);
  return std::nullopt;
}

}  // namespace

std::string GgufValue::shown() const {
  if (type == GgufType::kArray) return cat("an array of ", count);
  if (type == GgufType::kString) return quote_name(as_text(bytes));
  if (type == GgufType::kBool) return load_little(bytes) != 0 ? "true" : "false";
  if (type == GgufType::kU64) return cat(load_little(bytes));
  if (const auto integer = load_integer(type, bytes)) return cat(*integer);
  return cat(load_number(type, bytes).value_or(0));
}

GgufFile::GgufFile(const std::string& path)
    : file_(path), header_(parse_gguf(file_.bytes(), path)) {}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto found = header_.metadata.find(key);
  return found == header_.metadata.end() ? nullptr : &found->second;
}

std::string GgufFile::complaint(std::string_view key, std::string_view accepted) const {
  const GgufValue* value = find(key);
  return cat(path(), ": ", key, ", got ", value == nullptr ? "nothing" : value->shown(),
             ", accepted ", accepted);
}

void GgufFile::reject(std::string_view key, std::string_view accepted) const {
  fail(ErrorCode::kInvalidFile, kGgufWhere, complaint(key, accepted));
}

void GgufFile::unsupported(std::string_view key, std::string_view accepted) const {
  fail(ErrorCode::kUnsupported, kGgufWhere, complaint(key, accepted));
}

std::int64_t GgufFile::integer(std::string_view key, std::int64_t low, std::int64_t high) const {
  const GgufValue* value = find(key);
  std::optional<std::int64_t> out;
  if (value != nullptr) out = load_integer(value->type, value->bytes);
  if (!out || *out < low || *out > high) {
    reject(key, cat("an integer from ", low, " to ", high));
  }
  return *out;
}

std::int64_t GgufFile::integer_or(std::string_view key, std::int64_t low, std::int64_t high,
                                  std::int64_t missing) const {
  return has(key) ? integer(key, low, high) : missing;
}

double GgufFile::number(std::string_view key, double low, double high) const {
  const GgufValue* value = find(key);
  std::optional<double> out;
  if (value != nullptr) out = load_number(value->type, value->bytes);
  if (!out || !std::isfinite(*out) || *out < low || *out > high) {
    reject(key, cat("a number from ", low, " to ", high));
  }
  return *out;
}

double GgufFile::number_or(std::string_view key, double low, double high, double missing) const {
  return has(key) ? number(key, low, high) : missing;
}

bool GgufFile::boolean_or(std::string_view key, bool missing) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return missing;
  if (value->type != GgufType::kBool) reject(key, "true or false");
  return load_little(value->bytes) != 0;
}

std::optional<std::string_view> GgufFile::string(std::string_view key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != GgufType::kString) reject(key, "a string");
  return as_text(value->bytes);
}

const GgufValue* GgufFile::find_array(std::string_view key, std::string_view accepted) const {
  const GgufValue* value = find(key);
  if (value != nullptr && value->type != GgufType::kArray) reject(key, accepted);
  return value;
}

std::vector<std::string_view> GgufFile::strings(std::string_view key) const {
  constexpr std::string_view kAccepted = "an array of strings";
  const GgufValue* value = find_array(key, kAccepted);
  std::vector<std::string_view> out;
  if (value == nullptr) return out;
  if (value->element != GgufType::kString) reject(key, kAccepted);
  out.reserve(value->count);
  auto rest = value->bytes;
  for (std::uint64_t i = 0; i < value->count; ++i) {
    const std::uint64_t length = load_little(rest.first(8));
    out.push_back(as_text(rest.subspan(8, length)));
    rest = rest.subspan(8 + length);
  }
  return out;
}

std::vector<float> GgufFile::floats(std::string_view key) const {
  constexpr std::string_view kAccepted = "an array of 32-bit floats";
  const GgufValue* value = find_array(key, kAccepted);
  std::vector<float> out;
  if (value == nullptr) return out;
  if (value->element != GgufType::kF32) reject(key, kAccepted);
  out.reserve(value->count);
  for (std::uint64_t i = 0; i < value->count; ++i) {
    const auto bits = static_cast<std::uint32_t>(load_little(value->bytes.subspan(4 * i, 4)));
    out.push_back(std::bit_cast<float>(bits));
  }
  return out;
}

std::vector<std::int32_t> GgufFile::integers(std::string_view key, std::int32_t low,
                                             std::int32_t high) const {
  const std::string accepted = cat("an array of integers from ", low, " to ", high);
  const GgufValue* value = find_array(key, accepted);
  std::vector<std::int32_t> out;
  if (value == nullptr) return out;
  const std::uint64_t size = gguf_scalar_bytes(value->element);
  if (size == 0) reject(key, accepted);
  out.reserve(value->count);
  for (std::uint64_t i = 0; i < value->count; ++i) {
    const auto integer = load_integer(value->element, value->bytes.subspan(size * i, size));
    if (!integer || *integer < low || *integer > high) reject(key, accepted);
    out.push_back(static_cast<std::int32_t>(*integer));
  }
  return out;
}

std::optional<std::string> find_gguf(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    if (fs::is_regular_file(path, ignored)) return path;
    return std::nullopt;
  }
  if (fs::exists(fs::path(path) / "config.json", ignored)) return std::nullopt;
  std::optional<std::string> found;
  for (const auto& entry : fs::directory_iterator(path, ignored)) {
    if (entry.path().extension() != ".gguf") continue;
    if (found) {
      fail(ErrorCode::kInvalidFile, kGgufWhere, path,
           ": model files, got several *.gguf, accepted one, or the path of one of them");
    }
    found = entry.path().string();
  }
  return found;
}

}  // namespace twilight
