#ifndef TWILIGHT_MODEL_SAFETENSORS_H_
#define TWILIGHT_MODEL_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/mapped_file.h"
#include "model/tensor_view.h"
#include "twilight/types.h"

namespace twilight {

/// What the header of a file says about one tensor. `begin` and `end` are bytes from the file's
/// start.
struct SafetensorsEntry {
  std::string name;
  std::string dtype_name;      ///< as written: "BF16", "I64", ...
  std::optional<DType> dtype;  ///< set for F32, F16 and BF16
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// Checks the whole header of a safetensors file and returns its tensors in order of position:
/// header length against the file and the format's cap of 100 MB, JSON, names given once, shape
/// times element size against the byte range, and ranges that fill the data section without overlap
/// or gap. An element type other than F32, F16 and BF16 is no error here. `path` is only quoted in
/// errors, which are Error(kInvalidFile) `[safetensors] path: tensor 'name' what, got VALUE,
/// accepted SET`.
[[nodiscard]] std::vector<SafetensorsEntry> parse_safetensors(std::span<const std::byte> file,
                                                              const std::string& path);

/// Reads a model.safetensors.index.json: tensor name to the file name of its shard. Shards are
/// plain names in the folder of the index, so no path separators. Errors as above.
[[nodiscard]] std::map<std::string, std::string> parse_safetensors_index(std::string_view json_text,
                                                                         const std::string& path);

/// The tensors of a model folder: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` names (the single file wins where both exist). Maps the files and
/// keeps them mapped as long as it lives; views point into them. Safe to read from several threads.
class Checkpoint final : public TensorSource {
 public:
  /// Throws Error(kNotFound) for a missing file, Error(kInvalidFile) for a malformed one.
  explicit Checkpoint(const std::string& model_dir);

  [[nodiscard]] bool contains(const std::string& name) const override {
    return tensors_.count(name) != 0;
  }
  [[nodiscard]] TensorView tensor(const std::string& name) const override;
  [[nodiscard]] std::vector<std::string> names() const override;
  [[nodiscard]] const std::string& path_of(const std::string& name) const override;
  void check_unchanged() const override;

 private:
  struct Slot {
    std::size_t file;
    SafetensorsEntry entry;
  };

  void add_file(const std::string& path);
  void open_shards(const std::string& model_dir);

  std::string root_path_;
  std::vector<MappedFile> files_;
  std::map<std::string, Slot> tensors_;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_SAFETENSORS_H_
