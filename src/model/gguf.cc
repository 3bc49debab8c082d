#include "model/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <set>
#include <tuple>

#include "core/check.h"
#include "model/gguf_scalar.h"
#include "model/json_reader.h"

namespace twilight {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr std::string_view kGitLfsStart = "version https://git-lfs";
constexpr std::uint64_t kHeaderBytes = 24;
constexpr std::uint64_t kMinPairBytes = 13;    // key length, type, one byte
constexpr std::uint64_t kMinTensorBytes = 32;  // name length, rank, one size, type, offset
constexpr std::uint64_t kMaxNameBytes = 65535;
constexpr std::uint32_t kMaxRank = 4;
constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint64_t kMaxAlignment = std::uint64_t{1} << 20;
constexpr int kMaxDepth = 8;
constexpr const char* kAlignmentKey = "general.alignment";

// Types that are known but not read, for messages.
struct TypeName {
  std::uint32_t number;
  std::string_view name;
};
constexpr std::array<TypeName, 20> kOtherTypes = {{
    {9, "Q8_1"},   {15, "Q8_K"},   {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"},
    {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"},   {22, "IQ2_S"},  {23, "IQ4_XS"},
    {24, "I8"},    {25, "I16"},    {26, "I32"},     {27, "I64"},    {28, "F64"},
    {29, "IQ1_M"}, {34, "TQ1_0"},  {35, "TQ2_0"},   {39, "MXFP4"},  {40, "NVFP4"},
}};

// Reads the header front to back; every read is checked against the end of the file.
class Reader {
 public:
  Reader(std::span<const std::byte> file, const std::string& path) : file_(file), path_(path) {}

  template <typename... Args>
  [[noreturn]] void bad(const Args&... rest) const {
    fail(ErrorCode::kInvalidFile, kGgufWhere, path_, ": ", rest...);
  }

  [[nodiscard]] std::uint64_t left() const { return file_.size() - at_; }
  [[nodiscard]] std::uint64_t position() const { return at_; }

  std::span<const std::byte> take(std::uint64_t bytes, std::string_view what) {
    if (bytes > left()) {
      bad(what, ", got ", bytes, " bytes, accepted at most ", left(),
          ", the rest of the file (is the file truncated?)");
    }
    const auto out = file_.subspan(at_, bytes);
    at_ += bytes;
    return out;
  }
  std::uint32_t u32(std::string_view what) {
    return static_cast<std::uint32_t>(load_little(take(4, what)));
  }
  std::uint64_t u64(std::string_view what) { return load_little(take(8, what)); }
  std::span<const std::byte> string(std::string_view what) {
    return take(u64(cat(what, " length")), what);
  }
  std::string name(std::string_view what) {
    const auto bytes = string(what);
    if (bytes.empty() || bytes.size() > kMaxNameBytes) {
      bad(what, ", got ", bytes.size(), " bytes, accepted 1 to ", kMaxNameBytes);
    }
    return std::string(as_text(bytes));
  }

  // Elements of an array, their own headers included.
  void skip_elements(GgufType type, std::uint64_t count, const std::string& what, int depth) {
    if (const std::uint64_t size = gguf_scalar_bytes(type); size > 0) {
      std::uint64_t bytes = 0;
      if (__builtin_mul_overflow(count, size, &bytes)) {
        bad(what, ", got ", count, " elements, accepted at most ", left() / size);
      }
      const auto data = take(bytes, what);
      if (type == GgufType::kBool) check_booleans(data, what);
      return;
    }
    // Each has a header of at least 8 bytes, so this ends with the file.
    if (count > left() / 8) {
      bad(what, ", got ", count, " elements, accepted at most ", left() / 8,
          " in the rest of the file (is the file truncated?)");
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      if (type == GgufType::kString) {
        (void)string(what);
      } else {
        (void)array(what, depth + 1);
      }
    }
  }

  GgufValue array(const std::string& what, int depth) {
    if (depth > kMaxDepth) bad(what, ", got arrays nested deeper, accepted at most ", kMaxDepth);
    GgufValue out;
    out.type = GgufType::kArray;
    out.element = value_type(what);
    out.count = u64(cat(what, " count"));
    const std::uint64_t begin = at_;
    skip_elements(out.element, out.count, what, depth);
    out.bytes = file_.subspan(begin, at_ - begin);
    return out;
  }

  GgufValue value(const std::string& what) {
    const GgufType type = value_type(what);
    if (type == GgufType::kArray) return array(what, 1);
    GgufValue out;
    out.type = type;
    out.bytes = type == GgufType::kString ? string(what) : take(gguf_scalar_bytes(type), what);
    if (type == GgufType::kBool) check_booleans(out.bytes, what);
    return out;
  }

 private:
  GgufType value_type(const std::string& what) {
    const std::uint32_t number = u32(cat(what, " type"));
    if (number > static_cast<std::uint32_t>(GgufType::kF64)) {
      bad(what, " type, got ", number, ", accepted 0 to ",
          static_cast<std::uint32_t>(GgufType::kF64));
    }
    return static_cast<GgufType>(number);
  }

  void check_booleans(std::span<const std::byte> bytes, const std::string& what) const {
    for (const std::byte byte : bytes) {
      if (byte > std::byte{1}) {
        bad(what, ", got ", std::to_integer<int>(byte), ", accepted a boolean, 0 or 1");
      }
    }
  }

  std::span<const std::byte> file_;
  const std::string& path_;
  std::uint64_t at_ = 0;
};

void read_start(Reader& in, std::span<const std::byte> file, const std::string& path,
                GgufHeader& header) {
  const std::string_view start = as_text(file.first(std::min<std::size_t>(file.size(), 64)));
  if (start.starts_with(kGitLfsStart)) {
    in.bad("content, got a Git LFS pointer, accepted the GGUF file it stands for");
  }
  if (!start.starts_with(kMagic)) {
    in.bad("first bytes, got ", quote_name(start.substr(0, 4)), ", accepted 'GGUF'");
  }
  if (file.size() < kHeaderBytes) {
    in.bad("size, got ", file.size(), " bytes, accepted at least ", kHeaderBytes,
           " (is the file truncated?)");
  }
  (void)in.take(kMagic.size(), "magic");
  header.version = in.u32("version");
  if (header.version == 2 || header.version == 3) return;
  const std::uint32_t swapped = __builtin_bswap32(header.version);
  if (swapped >= 1 && swapped <= 3) {
    fail(ErrorCode::kUnsupported, kGgufWhere, path,
         ": byte order, got big-endian, accepted little-endian");
  }
  fail(ErrorCode::kUnsupported, kGgufWhere, path, ": version, got ", header.version,
       ", accepted 2 or 3");
}

void read_metadata(Reader& in, std::uint64_t count, GgufHeader& header) {
  for (std::uint64_t i = 0; i < count; ++i) {
    std::string key = in.name(cat("key ", i));
    const std::string what = quote_name(key);
    if (header.metadata.count(key) != 0) in.bad("key ", what, ", got it twice, accepted it once");
    header.metadata.emplace(std::move(key), in.value(what));
  }
}

void read_alignment(const Reader& in, GgufHeader& header) {
  header.alignment = kDefaultAlignment;
  const auto found = header.metadata.find(kAlignmentKey);
  if (found == header.metadata.end()) return;
  const GgufValue& value = found->second;
  if (value.type == GgufType::kU32) header.alignment = load_little(value.bytes);
  if (value.type != GgufType::kU32 || !std::has_single_bit(header.alignment) ||
      header.alignment > kMaxAlignment) {
    in.bad(kAlignmentKey, ", got ", value.shown(), ", accepted a power of two up to ",
           kMaxAlignment);
  }
}

// Sets type and bytes; throws for a shape that no file can hold.
void measure(const Reader& in, const std::string& what, GgufTensor& tensor) {
  std::int64_t elements = 1;
  for (const std::int64_t size : tensor.shape) {
    if (__builtin_mul_overflow(elements, size, &elements)) {
      in.bad(what, " shape, got more elements than 64 bits count, accepted less");
    }
  }
  if (!is_weight_type(tensor.type_number)) return;
  tensor.type = static_cast<WeightType>(tensor.type_number);
  const int length = weight_block_length(*tensor.type);
  if (tensor.shape.back() % length != 0) {
    in.bad(what, " row, got ", tensor.shape.back(), " elements, accepted multiples of ", length,
           ", the block of ", weight_type_name(*tensor.type));
  }
  if (__builtin_mul_overflow(elements / length, std::int64_t{weight_block_bytes(*tensor.type)},
                             &tensor.bytes)) {
    in.bad(what, " shape, got more bytes than 64 bits count, accepted less");
  }
}

GgufTensor read_tensor(Reader& in, std::uint64_t index, std::uint64_t alignment) {
  GgufTensor tensor;
  tensor.name = in.name(cat("name of tensor ", index));
  const std::string what = cat("tensor ", quote_name(tensor.name));
  const std::uint32_t rank = in.u32(cat(what, " rank"));
  if (rank < 1 || rank > kMaxRank) in.bad(what, " rank, got ", rank, ", accepted 1 to ", kMaxRank);
  for (std::uint32_t axis = 0; axis < rank; ++axis) {
    const std::uint64_t size = in.u64(cat(what, " shape"));
    if (size < 1 || size > static_cast<std::uint64_t>(INT64_MAX)) {
      in.bad(what, " shape, got a size of ", size, ", accepted 1 to ", INT64_MAX);
    }
    tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
  }
  tensor.type_number = in.u32(cat(what, " type"));
  const std::uint64_t offset = in.u64(cat(what, " offset"));
  if (offset % alignment != 0 || offset > static_cast<std::uint64_t>(INT64_MAX)) {
    in.bad(what, " offset, got ", offset, ", accepted multiples of ", alignment,
           " inside the file");
  }
  tensor.begin = static_cast<std::int64_t>(offset);
  measure(in, what, tensor);
  return tensor;
}

// Turns offsets in the data section into positions in the file, and checks the ranges.
void place_tensors(const Reader& in, std::uint64_t file_bytes, GgufHeader& header) {
  // The header may end with the file where no tensor follows it.
  const std::uint64_t data_begin =
      (in.position() + header.alignment - 1) / header.alignment * header.alignment;
  const std::uint64_t data_bytes = file_bytes - std::min(file_bytes, data_begin);
  for (GgufTensor& tensor : header.tensors) {
    const auto offset = static_cast<std::uint64_t>(tensor.begin);
    if (offset > data_bytes || static_cast<std::uint64_t>(tensor.bytes) > data_bytes - offset) {
      in.bad("tensor ", quote_name(tensor.name), " data, got ", tensor.bytes, " bytes at offset ",
             offset, ", accepted up to ", data_bytes,
             ", the data section's size (is the file truncated?)");
    }
    tensor.begin = static_cast<std::int64_t>(data_begin + offset);
  }
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.bytes, a.name) < std::tie(b.begin, b.bytes, b.name);
  });
  const GgufTensor* last = nullptr;
  for (const GgufTensor& tensor : header.tensors) {
    if (last != nullptr && tensor.begin < last->begin + last->bytes) {
      in.bad("tensor ", quote_name(tensor.name), " data, got a range that overlaps ",
             quote_name(last->name), ", accepted ranges without overlap");
    }
    last = &tensor;
  }
}

}  // namespace

std::string gguf_tensor_type_name(std::uint32_t number) {
  if (is_weight_type(number)) {
    return std::string(weight_type_name(static_cast<WeightType>(number)));
  }
  for (const TypeName& type : kOtherTypes) {
    if (type.number == number) return std::string(type.name);
  }
  return cat("type ", number);
}

GgufHeader parse_gguf(std::span<const std::byte> file, const std::string& path) {
  GgufHeader header;
  Reader in(file, path);
  read_start(in, file, path, header);
  const std::uint64_t num_tensors = in.u64("tensor count");
  const std::uint64_t num_pairs = in.u64("metadata count");
  if (num_pairs > in.left() / kMinPairBytes) {
    in.bad("metadata count, got ", num_pairs, ", accepted at most ", in.left() / kMinPairBytes,
           " in a file of this size");
  }
  if (num_tensors > in.left() / kMinTensorBytes) {
    in.bad("tensor count, got ", num_tensors, ", accepted at most ", in.left() / kMinTensorBytes,
           " in a file of this size");
  }
  read_metadata(in, num_pairs, header);
  read_alignment(in, header);
  std::set<std::string, std::less<>> names;
  for (std::uint64_t i = 0; i < num_tensors; ++i) {
    GgufTensor tensor = read_tensor(in, i, header.alignment);
    if (!names.insert(tensor.name).second) {
      in.bad("tensor ", quote_name(tensor.name), ", got it twice, accepted it once");
    }
    header.tensors.push_back(std::move(tensor));
  }
  place_tensors(in, file.size(), header);
  return header;
}

}  // namespace twilight
