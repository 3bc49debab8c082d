#include "calibrate_labels.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "twilight/error.h"

namespace twilight::app {

std::vector<std::int32_t> top_channels(std::span<const double> importance, std::int32_t head_dim,
                                       std::int32_t count) {
  const auto dim = static_cast<std::size_t>(head_dim);
  std::vector<std::int32_t> out, order(dim);
  for (std::size_t row = 0; row < importance.size(); row += dim) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return importance[row + static_cast<std::size_t>(a)] >
             importance[row + static_cast<std::size_t>(b)];
    });
    std::sort(order.begin(), order.begin() + count);
    out.insert(out.end(), order.begin(), order.begin() + count);
  }
  return out;
}

LabelCalibration calibrate_labels(Engine& engine, std::span<const std::int32_t> tokens,
                                  std::int32_t num_queries, std::int32_t num_labels,
                                  const Progress& progress) {
  const ModelInfo& info = engine.model().info();
  const auto dim = static_cast<std::size_t>(info.head_dim);
  const auto q_heads = static_cast<std::size_t>(info.num_q_heads);
  const auto kv_heads = static_cast<std::size_t>(info.num_kv_heads);
  const auto layers = static_cast<std::size_t>(info.num_layers);
  const std::size_t group = q_heads / kv_heads;
  const std::size_t first = tokens.size() - static_cast<std::size_t>(num_queries);
  engine.set_policy(make_policy("dense"));
  Sequence sequence = engine.cache().new_sequence();
  const Engine::Status read = engine.prefill(sequence, tokens.first(first), {}, progress);
  if (read == Engine::Status::kCancelled) return {};
  std::vector<double> queries(layers * kv_heads * dim);  // sums of |q_d|
  engine.observe_queries([&](std::int32_t layer, const float* q) {
    for (std::size_t head = 0; head < q_heads; ++head) {
      double* sums =
          queries.data() + (static_cast<std::size_t>(layer) * kv_heads + head / group) * dim;
      for (std::size_t d = 0; d < dim; ++d) sums[d] += std::abs(double{q[head * dim + d]});
    }
  });
  std::vector<float> logits(static_cast<std::size_t>(info.vocab_size));
  bool running = read == Engine::Status::kOk;
  for (std::size_t i = first; running && i < tokens.size(); ++i) {
    if (!progress(static_cast<std::int64_t>(i), static_cast<std::int64_t>(tokens.size()))) {
      engine.observe_queries({});
      return {};
    }
    Sequence* const batch[] = {&sequence};
    running = engine.decode(batch, {&tokens[i], 1}, logits) == Engine::Status::kOk;
  }
  engine.observe_queries({});
  if (!running) throw Error(ErrorCode::kInternal, "[calibrate] the cache ran out of pages");

  std::vector<double> importance(queries.size());
  std::vector<float> keys(tokens.size() * kv_heads * dim), values(keys.size());
  for (std::size_t layer = 0; layer < layers; ++layer) {
    engine.cache().read(sequence, static_cast<std::int32_t>(layer), keys.data(), values.data());
    double* sums = importance.data() + layer * kv_heads * dim;
    for (std::size_t token = 0; token < tokens.size(); ++token) {
      const float* key = keys.data() + token * kv_heads * dim;
      for (std::size_t i = 0; i < kv_heads * dim; ++i) sums[i] += std::abs(double{key[i]});
    }
  }
  for (std::size_t i = 0; i < importance.size(); ++i) {
    importance[i] *= queries[i] / static_cast<double>(tokens.size()) /
                     static_cast<double>(group * static_cast<std::size_t>(num_queries));
  }
  LabelCalibration out;
  out.labels = top_channels(importance, info.head_dim, num_labels);
  const std::size_t rows = layers * kv_heads;
  for (std::size_t row = 0; row < rows; ++row) {
    double held = 0, all = 0;
    for (std::size_t d = 0; d < dim; ++d) all += importance[row * dim + d];
    for (std::int32_t i = 0; i < num_labels; ++i) {
      const auto at = row * static_cast<std::size_t>(num_labels) + static_cast<std::size_t>(i);
      held += importance[row * dim + static_cast<std::size_t>(out.labels[at])];
    }
    if (all > 0) out.share += held / all / static_cast<double>(rows);
  }
  return out;
}

}  // namespace twilight::app
