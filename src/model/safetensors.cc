#include "model/safetensors.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <limits>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "model/json_reader.h"

namespace twilight {
namespace {

constexpr std::string_view kWhere = "safetensors";
constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the cap of the format's own reader
constexpr std::size_t kMaxRank = 8;
constexpr std::string_view kGitLfsStart = "version ";

// Element sizes of the format, in bits. Types that are not listed are left unchecked until used.
struct ElementType {
  std::string_view name;
  std::int64_t bits;
};
constexpr std::array<ElementType, 21> kElementTypes = {{
    {"F32", 32},    {"F16", 16},    {"BF16", 16},       {"F64", 64},    {"I64", 64},    {"I32", 32},
    {"I16", 16},    {"I8", 8},      {"U64", 64},        {"U32", 32},    {"U16", 16},    {"U8", 8},
    {"BOOL", 8},    {"C64", 64},    {"F8_E4M3", 8},     {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F4", 4},
    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F8_E4M3FNUZ", 8},
}};

std::optional<DType> element_type(std::string_view name) {
  if (name == "F32") return DType::kF32;
  if (name == "F16") return DType::kF16;
  if (name == "BF16") return DType::kBf16;
  return std::nullopt;
}

template <typename... Args>
[[noreturn]] void bad_file(const std::string& path, const Args&... rest) {
  fail(ErrorCode::kInvalidFile, kWhere, path, ": ", rest...);
}

// Throws unless shape times element size fills the byte range of `entry`.
void check_size(const SafetensorsEntry& entry, const std::string& path) {
  std::int64_t elements = 1;
  for (const std::int64_t size : entry.shape) {
    if (__builtin_mul_overflow(elements, size, &elements)) {
      bad_file(path, "tensor ", quote_name(entry.name),
               " shape, got more elements than 64 bits count, accepted less");
    }
  }
  const auto* type = std::find_if(kElementTypes.begin(), kElementTypes.end(),
                                  [&](const auto& t) { return t.name == entry.dtype_name; });
  if (type == kElementTypes.end()) return;
  std::int64_t bits = 0;
  const bool overflow = __builtin_mul_overflow(elements, type->bits, &bits);
  const std::int64_t bytes = entry.end - entry.begin;
  if (overflow || bits % 8 != 0 || bits / 8 != bytes) {
    bad_file(path, "tensor ", quote_name(entry.name), " data_offsets, got ", bytes,
             " bytes, accepted ", elements, " elements of ", entry.dtype_name);
  }
}

SafetensorsEntry read_entry(const std::string& name, const nlohmann::json& value,
                            std::int64_t data_start, std::int64_t data_bytes,
                            const std::string& path) {
  const std::string prefix = cat("tensor ", quote_name(name), ' ');
  const JsonReader json(value, kWhere, path, prefix);
  SafetensorsEntry entry;
  entry.name = name;
  const auto dtype = json.string("dtype");
  if (!dtype) json.reject("dtype", "a string");
  entry.dtype_name = *dtype;
  entry.dtype = element_type(*dtype);

  const nlohmann::json* shape = json.find("shape");
  if (shape == nullptr || !shape->is_array() || shape->size() > kMaxRank) {
    json.reject("shape", cat("a list of at most ", kMaxRank, " sizes"));
  }
  entry.shape = json.integers("shape", 0, std::numeric_limits<std::int64_t>::max());

  const nlohmann::json* range = json.find("data_offsets");
  if (range == nullptr || !range->is_array() || range->size() != 2) {
    json.reject("data_offsets", "a list of two offsets");
  }
  const auto offsets = json.integers("data_offsets", 0, std::numeric_limits<std::int64_t>::max());
  if (offsets[0] > offsets[1]) json.reject("data_offsets", "begin no greater than end");
  if (offsets[1] > data_bytes) {
    json.reject("data_offsets", cat("offsets up to ", data_bytes,
                                    ", the data section's size (is the file truncated?)"));
  }
  entry.begin = data_start + offsets[0];
  entry.end = data_start + offsets[1];
  check_size(entry, path);
  return entry;
}

// Throws unless the sorted ranges follow one another from `data_start` to the file's end.
void check_ranges(const std::vector<SafetensorsEntry>& entries, std::int64_t data_start,
                  std::int64_t file_bytes, const std::string& path) {
  std::int64_t position = data_start;
  const SafetensorsEntry* last = nullptr;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin < position) {
      bad_file(path, "tensor ", quote_name(entry.name), " data_offsets, got a range that overlaps ",
               quote_name(last->name), ", accepted ranges without overlap");
    }
    if (entry.begin > position) {
      bad_file(path, "tensor ", quote_name(entry.name), " data_offsets, got a gap of ",
               entry.begin - position, " bytes before it, accepted ranges without gaps");
    }
    position = entry.end;
    last = &entry;
  }
  if (position != file_bytes) {
    bad_file(path, "size, got ", file_bytes, " bytes, accepted ", position,
             ", where the last tensor ends");
  }
}

std::uint64_t read_header_length(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < kLengthBytes) {
    bad_file(path, "size, got ", file.size(), " bytes, accepted at least ", kLengthBytes,
             " (is the file truncated?)");
  }
  const std::string_view start(reinterpret_cast<const char*>(file.data()), kLengthBytes);
  if (start == kGitLfsStart) {
    bad_file(path, "content, got a Git LFS pointer, accepted the safetensors file it stands for");
  }
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    length |= std::to_integer<std::uint64_t>(file[i]) << (8 * i);
  }
  if (length > kMaxHeaderBytes) {
    bad_file(path, "header length, got ", length, " bytes, accepted at most ", kMaxHeaderBytes);
  }
  if (length > file.size() - kLengthBytes) {
    bad_file(path, "header length, got ", length, " bytes, accepted at most ",
             file.size() - kLengthBytes, ", the rest of the file (is the file truncated?)");
  }
  return length;
}

}  // namespace

std::vector<SafetensorsEntry> parse_safetensors(std::span<const std::byte> file,
                                                const std::string& path) {
  const std::uint64_t length = read_header_length(file, path);
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  if (text.empty() || text.front() != '{') {
    bad_file(path, "header, got ", quote_name(text.substr(0, 1)), " at its start, accepted '{'");
  }
  const nlohmann::json header = parse_json(text, kWhere, path);
  const auto data_start = static_cast<std::int64_t>(kLengthBytes + length);
  const auto file_bytes = static_cast<std::int64_t>(file.size());
  std::vector<SafetensorsEntry> entries;
  entries.reserve(header.size());
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") continue;
    entries.push_back(read_entry(name, value, data_start, file_bytes - data_start, path));
  }
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_ranges(entries, data_start, file_bytes, path);
  return entries;
}

std::map<std::string, std::string> parse_safetensors_index(std::string_view json_text,
                                                           const std::string& path) {
  if (json_text.size() > kMaxHeaderBytes) {
    bad_file(path, "size, got ", json_text.size(), " bytes, accepted at most ", kMaxHeaderBytes);
  }
  const nlohmann::json document = parse_json(json_text, kWhere, path);
  const JsonReader json(document, kWhere, path);
  if (!json.has("weight_map") || !document["weight_map"].is_object()) {
    json.reject("weight_map", "an object");
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, value] : document["weight_map"].items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : std::string();
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      bad_file(path, "weight_map entry ", quote_name(tensor), ", got ",
               value.is_string() ? quote_name(shard) : std::string("no string"),
               ", accepted a file name without a folder");
    }
    shards.emplace(tensor, shard);
  }
  return shards;
}

Checkpoint::Checkpoint(const std::string& model_dir) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const std::string single = model_dir + "/model.safetensors";
  if (fs::exists(single, ignored)) {
    root_path_ = single;
    add_file(single);
    return;
  }
  root_path_ = single + ".index.json";
  if (fs::exists(root_path_, ignored)) {
    open_shards(model_dir);
    return;
  }
  const bool pickled = fs::exists(model_dir + "/pytorch_model.bin", ignored) ||
                       fs::exists(model_dir + "/pytorch_model.bin.index.json", ignored);
  fail(ErrorCode::kNotFound, kWhere, model_dir, ": weights, got ",
       pickled ? "only pytorch_model.bin (convert it to safetensors)" : "none",
       ", accepted model.safetensors or model.safetensors.index.json");
}

void Checkpoint::add_file(const std::string& path) {
  const std::size_t file = files_.size();
  files_.emplace_back(path);
  for (SafetensorsEntry& entry : parse_safetensors(files_[file].bytes(), path)) {
    const std::string name = entry.name;
    tensors_.emplace(name, Slot{file, std::move(entry)});
  }
}

// The index decides which shard a tensor comes from; a shard's tensors that the index does not give
// to that shard are left out.
void Checkpoint::open_shards(const std::string& model_dir) {
  const auto index = parse_safetensors_index(read_text_file(root_path_), root_path_);
  std::map<std::string, std::vector<std::string>> by_shard;
  for (const auto& [tensor, shard] : index) by_shard[shard].push_back(tensor);
  for (const auto& [shard, wanted] : by_shard) {
    std::string path = model_dir;
    path.append(1, '/').append(shard);
    std::error_code ignored;
    if (!std::filesystem::exists(path, ignored)) {
      fail(ErrorCode::kNotFound, kWhere, root_path_, ": shard ", quote_name(shard), " of tensor ",
           quote_name(wanted.front()), ", got no such file, accepted a file beside the index");
    }
    const std::size_t file = files_.size();
    files_.emplace_back(path);
    std::map<std::string, SafetensorsEntry> held;
    for (SafetensorsEntry& entry : parse_safetensors(files_[file].bytes(), path)) {
      const std::string name = entry.name;
      held.emplace(name, std::move(entry));
    }
    for (const std::string& name : wanted) {
      const auto it = held.find(name);
      if (it == held.end()) {
        bad_file(path, "tensor ", quote_name(name), ", got nothing, accepted the tensor that ",
                 root_path_, " places here");
      }
      tensors_.emplace(name, Slot{file, std::move(it->second)});
    }
  }
}

TensorView Checkpoint::tensor(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    bad_file(root_path_, "tensor ", quote_name(name),
             ", got nothing, accepted a tensor of that name");
  }
  const auto& [file, entry] = it->second;
  if (!entry.dtype) {
    fail(ErrorCode::kUnsupported, kWhere, files_[file].path(), ": tensor ", quote_name(name),
         " dtype, got ", quote_name(entry.dtype_name), ", accepted F32, F16 or BF16");
  }
  return {name, weight_type(*entry.dtype), entry.shape, files_[file].bytes().data() + entry.begin,
          entry.end - entry.begin};
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> out;
  out.reserve(tensors_.size());
  for (const auto& [name, slot] : tensors_) out.push_back(name);
  return out;
}

void Checkpoint::check_unchanged() const {
  for (const MappedFile& file : files_) file.check_unchanged();
}

const std::string& Checkpoint::path_of(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? root_path_ : files_[it->second.file].path();
}

}  // namespace twilight
