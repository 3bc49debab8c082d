#ifndef TWILIGHT_APPS_CALIBRATE_LABELS_H_
#define TWILIGHT_APPS_CALIBRATE_LABELS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "twilight/engine.h"

namespace twilight::app {

/// Which channels carry q.k, for the selector double_sparsity.
struct LabelCalibration {
  std::vector<std::int32_t> labels;  ///< [layers, Hkv, channels], ascending in each head
  /// Mean over layers and KV heads of the share of the mean of sum_d |q_d k_d| on them.
  double share = 0;
};

/// The `count` channels with the largest importance of each row of [rows, head_dim], ascending; of
/// equals the lower ones.
[[nodiscard]] std::vector<std::int32_t> top_channels(std::span<const double> importance,
                                                     std::int32_t head_dim, std::int32_t count);

/// Reads all but the last `num_queries` tokens densely and decodes those. The importance of a
/// channel is the mean of |q_d k_d| over these queries, the group's heads and all keys, which is
/// the mean of |q_d| times that of |k_d|. Empty labels where `progress` stopped it.
[[nodiscard]] LabelCalibration calibrate_labels(Engine& engine,
                                                std::span<const std::int32_t> tokens,
                                                std::int32_t num_queries, std::int32_t num_labels,
                                                const Progress& progress);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_CALIBRATE_LABELS_H_
