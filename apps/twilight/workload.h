#ifndef TWILIGHT_APPS_WORKLOAD_H_
#define TWILIGHT_APPS_WORKLOAD_H_

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "twilight/engine.h"

namespace twilight::app {

struct LayerShape {
  std::int32_t num_q_heads = 32;  ///< Hq
  std::int32_t num_kv_heads = 8;  ///< Hkv
  std::int32_t head_dim = 128;    ///< D
};

/// One attention layer of several sequences at one decode step: keys, values and the queries of the
/// new token, heads rotated already.
class Workload {
 public:
  virtual ~Workload() = default;

  [[nodiscard]] virtual LayerShape shape() const = 0;
  /// N of a sequence, the new token included.
  [[nodiscard]] virtual std::int32_t num_tokens(std::int32_t seq) const = 0;
  /// Makes a sequence's data ready; the calls below are for the one made ready last.
  virtual void prepare(std::int32_t seq) = 0;
  /// Keys and values [count, Hkv, D] of tokens `first` .. of the sequence.
  virtual void tokens(std::int32_t first, std::int32_t count, float* k, float* v) const = 0;
  /// [Hq, D].
  [[nodiscard]] virtual std::span<const float> query() const = 0;
  /// How the data was made, once every sequence has been prepared.
  [[nodiscard]] virtual nlohmann::ordered_json json() const = 0;
  /// The same in a line or two for people.
  [[nodiscard]] virtual std::string text() const = 0;
};

struct PlantedOptions {
  LayerShape shape;
  std::int32_t num_tokens = 32768;
  double budget = 0.02;  ///< mean size of the top-p sets, as a share of N
  double p = 0.95;       ///< of those sets
  std::uint64_t seed = 0;
};

/// Synthetic keys with heavy tokens planted so that the exact p-set of every query head has a drawn
/// size: heavy-tailed over heads, alike inside a group, the mean at `budget` * N. Everything else
/// (candidates, estimates, what is kept) follows from the keys. Throws Error(kInvalidArgument).
[[nodiscard]] std::unique_ptr<Workload> make_planted(const PlantedOptions& options);

struct CaptureOptions {
  std::string text_file;
  std::int32_t num_tokens = 32768;  ///< longest sequence
  std::int32_t num_seqs = 1;
  std::int32_t layer = -1;  ///< -1: the middle one
};

/// `layer`, or the middle one for -1. Throws Error(kInvalidArgument) where the model lacks it.
[[nodiscard]] std::int32_t capture_layer(const ModelInfo& info, std::int32_t layer);

/// Keys, values and queries of one layer while a model reads a text: prefill, then one decode step
/// of the text's own next token for each sequence. Sequence i is the text up to step i, so lengths
/// run up to `num_tokens`. Null where the user stopped it.
[[nodiscard]] std::unique_ptr<Workload> capture_workload(const Device& device, const Model& model,
                                                         const CaptureOptions& options,
                                                         bool show_progress);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_WORKLOAD_H_
