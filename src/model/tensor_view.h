#ifndef TWILIGHT_MODEL_TENSOR_VIEW_H_
#define TWILIGHT_MODEL_TENSOR_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "quant/weight_blocks.h"

namespace twilight {

/// One tensor of a model file: row-major, little-endian, read-only. A row of a quantised type is
/// whole blocks. `data` usually points into a mapped file and may sit on any byte: read it with
/// memcpy or unaligned loads unless `is_aligned()`. A default object stands for an absent tensor.
struct TensorView {
  std::string name;  ///< as the file spells it
  WeightType type = WeightType::kF32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::int64_t bytes = 0;

  [[nodiscard]] explicit operator bool() const { return data != nullptr; }
  [[nodiscard]] std::int64_t elements() const {
    return bytes / weight_block_bytes(type) * weight_block_length(type);
  }
  /// Whether `data` is a multiple of the element size; of quantised blocks, of their f16 fields.
  [[nodiscard]] bool is_aligned() const {
    const int size = is_quantised(type) ? 2 : weight_block_bytes(type);
    return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(size) == 0;
  }
};

/// Where a model's tensors come from, under the names that Hugging Face checkpoints give them
/// ("model.layers.0.mlp.up_proj.weight"). Views live as long as the source. Safe to read from
/// several threads.
class TensorSource {
 public:
  TensorSource() = default;
  virtual ~TensorSource() = default;
  TensorSource(const TensorSource&) = delete;
  TensorSource& operator=(const TensorSource&) = delete;

  [[nodiscard]] virtual bool contains(const std::string& name) const = 0;
  /// Throws Error(kInvalidFile) where the tensor is absent, Error(kUnsupported) for its element
  /// type.
  [[nodiscard]] virtual TensorView tensor(const std::string& name) const = 0;
  /// All names, sorted; a tensor that no name stands for under its own.
  [[nodiscard]] virtual std::vector<std::string> names() const = 0;
  /// The file that holds `name`, for messages; the index or single file where it is absent.
  [[nodiscard]] virtual const std::string& path_of(const std::string& name) const = 0;
  /// What the file calls the tensor, for messages.
  [[nodiscard]] virtual std::string spelling(const std::string& name) const { return name; }
  /// Throws Error(kIo) where a file was written to since it was mapped; see MappedFile.
  virtual void check_unchanged() const = 0;
};

}  // namespace twilight

#endif  // TWILIGHT_MODEL_TENSOR_VIEW_H_
