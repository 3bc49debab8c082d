#ifndef TWILIGHT_MODEL_GGUF_CHECKPOINT_H_
#define TWILIGHT_MODEL_GGUF_CHECKPOINT_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "model/config.h"
#include "model/gguf.h"
#include "model/tensor_view.h"

namespace twilight {

/// The tensors of a GGUF file under Hugging Face names, in place. Files of the "llama"
/// architecture hold the rows of a query or key head so that rotated pairs are neighbours; those
/// matrices and biases (about a tenth of a model) are copied with the rows back in halves, block by
/// block, the order of Hugging Face checkpoints.
class GgufCheckpoint final : public TensorSource {
 public:
  /// `config` is what `gguf_config` read from the same file.
  GgufCheckpoint(std::shared_ptr<const GgufFile> file, const ModelConfig& config);

  [[nodiscard]] bool contains(const std::string& name) const override {
    return tensors_.count(name) != 0;
  }
  [[nodiscard]] TensorView tensor(const std::string& name) const override;
  [[nodiscard]] std::vector<std::string> names() const override;
  [[nodiscard]] const std::string& path_of(const std::string&) const override {
    return file_->path();
  }
  [[nodiscard]] std::string spelling(const std::string& name) const override;
  void check_unchanged() const override { file_->file().check_unchanged(); }

 private:
  struct Slot {
    const GgufTensor* tensor;
    const std::byte* data;
  };

  void unpermute(Slot& slot, int heads, int head_dim);

  std::shared_ptr<const GgufFile> file_;
  std::map<std::string, Slot> tensors_;
  std::vector<Buffer> copies_;
};

/// Hugging Face name of a GGUF tensor, "blk.3.attn_q.weight" to
/// "model.layers.3.self_attn.q_proj.weight"; the name itself where none stands for it.
[[nodiscard]] std::string hugging_face_name(const std::string& gguf_name);

}  // namespace twilight

#endif  // TWILIGHT_MODEL_GGUF_CHECKPOINT_H_
