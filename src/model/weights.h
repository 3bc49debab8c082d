#ifndef TWILIGHT_MODEL_WEIGHTS_H_
#define TWILIGHT_MODEL_WEIGHTS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "model/config.h"
#include "model/tensor_view.h"

namespace twilight {

/// Tensors of one decoder layer. Matrices are [out, in], row-major; H is hidden_size, I is
/// intermediate_size. Biases and head norms are absent (false) where the configuration has none.
struct LayerWeights {
  TensorView input_norm;  ///< [H]
  TensorView q_proj;      ///< [Hq * D, H]
  TensorView k_proj;      ///< [Hkv * D, H]
  TensorView v_proj;      ///< [Hkv * D, H]
  TensorView o_proj;      ///< [H, Hq * D]
  TensorView q_bias;      ///< [Hq * D]
  TensorView k_bias;      ///< [Hkv * D]
  TensorView v_bias;      ///< [Hkv * D]
  TensorView o_bias;      ///< [H]
  TensorView q_norm;      ///< [D], of every query head
  TensorView k_norm;      ///< [D], of every key head
  TensorView post_norm;   ///< [H], before the feed-forward
  TensorView gate_proj;   ///< [I, H]
  TensorView up_proj;     ///< [I, H]
  TensorView down_proj;   ///< [H, I]
  TensorView gate_bias;   ///< [I]
  TensorView up_bias;     ///< [I]
  TensorView down_bias;   ///< [H]
};

/// What one element type has of a model.
struct WeightTotals {
  std::int64_t tensors = 0, parameters = 0, bytes = 0;
};

/// Every tensor of a model, with names, shapes and element types checked. Element types may differ
/// from tensor to tensor. Data may be unaligned for its type (see TensorView). Copies share the
/// mappings, which live as long as any copy does; views taken out of one must not outlive it.
struct ModelWeights {
  TensorView embed;       ///< [vocab, H]
  TensorView final_norm;  ///< [H]
  TensorView lm_head;     ///< [vocab, H]; the view of `embed` where embeddings are tied
  std::vector<LayerWeights> layers;
  std::int64_t parameters = 0;  ///< elements, tied embeddings counted once
  std::int64_t bytes = 0;       ///< of those elements
  std::map<WeightType, WeightTotals> types;
  std::shared_ptr<const TensorSource> source;
};

struct LoadOptions {
  bool check_finite = true;  ///< scan every weight for NaN and infinity; reads the whole checkpoint
  ThreadPool* pool = nullptr;  ///< shares out the scan; null scans on the calling thread
  /// Called on the calling thread with bytes scanned and in all; the result is ignored.
  std::function<bool(std::int64_t done, std::int64_t total)> progress;
};

/// Maps the checkpoint in `model_dir` and finds the tensors that `config` asks for. Rotary tables
/// that old checkpoints carry, and an lm_head beside tied embeddings, are passed over; any other
/// tensor that the architecture does not use is an error, since ignoring it would change the model.
/// Throws Error(kNotFound / kInvalidFile / kUnsupported)
/// `[weights] file: tensor 'name' what, got VALUE, accepted SET`, and Error(kIo) where a file was
/// written to meanwhile.
[[nodiscard]] ModelWeights load_weights(const std::string& model_dir, const ModelConfig& config,
                                        const LoadOptions& options = {});

/// The same from tensors that are open already; `source` is kept.
[[nodiscard]] ModelWeights load_weights(std::shared_ptr<const TensorSource> source,
                                        const ModelConfig& config, const LoadOptions& options = {});

}  // namespace twilight

#endif  // TWILIGHT_MODEL_WEIGHTS_H_
