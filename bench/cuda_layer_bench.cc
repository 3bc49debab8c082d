// Products between two attentions on cuda:0, as one launch (advance_layer) and one by one (linear,
// feed_forward, project), JSON on standard output. Shapes are those of published models, weights
// bf16 and different ones for every layer, at least 1.5 GB; microseconds are of a layer in a
// recorded run through all of them.
//
// Usage: cuda_layer_bench [SAMPLES]

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "backend/cuda/cuda_backend.h"
#include "core/float16.h"
#include "core/splitmix64.h"
#include "cuda_timing.h"

namespace twilight::cuda {
namespace {

struct Shape {
  const char* name;
  std::int64_t hidden, inner;
  std::int32_t q_heads, kv_heads, head_dim;

  [[nodiscard]] std::int64_t q() const { return std::int64_t{q_heads} * head_dim; }
  [[nodiscard]] std::int64_t kv() const { return std::int64_t{kv_heads} * head_dim; }
  [[nodiscard]] std::int64_t layer_bytes() const {
    return 2 * hidden * (2 * q() + 2 * kv() + 3 * inner);
  }
};

constexpr Shape kShapes[] = {{"Llama 3.2 1B", 2048, 8192, 32, 8, 64},
                             {"Qwen 2.5 1.5B", 1536, 8960, 12, 2, 128},
                             {"Llama 3.2 3B", 3072, 8192, 24, 8, 128},
                             {"Llama 3.1 8B", 4096, 14336, 32, 8, 128},
                             {"Qwen 2.5 32B", 5120, 27648, 40, 8, 128}};
constexpr std::int64_t kLeastBytes = 1'500'000'000;
constexpr std::int32_t kMostRows = 64;

class Bench {
 public:
  explicit Bench(const Shape& shape) : s_(shape), memory_(backend_.memory()) {
    std::uint64_t state = 1;
    std::vector<std::uint16_t> weights(std::size_t{1} << 24);
    for (std::uint16_t& w : weights) {
      w = f32_to_bf16(static_cast<float>(uniform(state) / 30));
    }
    const auto matrix = [&](std::int64_t rows, std::int64_t cols) -> WeightView {
      const auto bytes = static_cast<std::size_t>(2 * rows * cols);
      DeviceBuffer& buffer = buffers_.emplace_back(memory_, bytes);
      for (std::size_t at = 0; at < bytes; at += 2 * weights.size()) {
        memory_.upload(buffer.data() + at, weights.data(),
                       std::min(bytes - at, 2 * weights.size()));
      }
      return {buffer.data(), DType::kBf16, rows, cols};
    };
    for (std::int64_t bytes = 0; bytes < kLeastBytes; bytes += s_.layer_bytes()) {
      layers_.push_back({matrix(s_.hidden, s_.q()), matrix(s_.inner, s_.hidden),
                         matrix(s_.inner, s_.hidden), matrix(s_.hidden, s_.inner),
                         matrix(s_.q(), s_.hidden), matrix(s_.kv(), s_.hidden),
                         matrix(s_.kv(), s_.hidden)});
    }
    hidden_ = floats(s_.hidden);
    normed_ = floats(s_.hidden);
    mixed_ = floats(s_.q());
    gate_ = floats(s_.inner);
    up_ = floats(s_.inner);
    q_ = floats(s_.q());
    k_ = floats(s_.kv());
    v_ = floats(s_.kv());
    cos_ = floats(s_.head_dim / 2);
    norm_ = floats(s_.hidden);
  }

  /// Microseconds of a layer.
  LaunchTimes layer_us(std::int32_t rows, bool together, int samples) {
    const auto all = [&] {
      for (std::size_t i = 0; i < layers_.size(); ++i) {
        const ProjectParams next = project(layers_[(i + 1) % layers_.size()], rows);
        AdvanceLayerParams p = advance(layers_[i], rows);
        if (together) {
          p.next = &next;
          backend_.advance_layer(p);
        } else {
          backend_.linear(p.out);
          backend_.feed_forward(p.feed);
          backend_.project(next);
        }
      }
    };
    all();
    const auto recorded = backend_.record(all);
    LaunchTimes times = time_launches(backend_.stream(), samples, [&] { recorded->replay(); });
    for (double* us : {&times.median, &times.low, &times.high}) {
      *us /= static_cast<double>(layers_.size());
    }
    return times;
  }
  [[nodiscard]] std::string device() const { return backend_.description(); }

 private:
  struct Layer {
    WeightView out, gate, up, down, q, k, v;
  };

  static double uniform(std::uint64_t& state) {
    return static_cast<double>(splitmix64(state += kSplitMixStep) >> 11) * 0x1p-52 - 1;
  }
  float* floats(std::int64_t row) {
    std::uint64_t state = 2;
    std::vector<float> values(static_cast<std::size_t>(row * kMostRows));
    for (float& x : values) x = static_cast<float>(uniform(state));
    DeviceBuffer& buffer = buffers_.emplace_back(memory_, values.size() * sizeof(float));
    memory_.upload(buffer.data(), values.data(), buffer.size());
    return buffer.as<float>();
  }
  static LinearParams product(const WeightView& w, const float* x, float* y, std::int32_t rows,
                              bool adds) {
    return {.x = x,
            .x_stride = w.cols,
            .num_rows = rows,
            .weight = w,
            .y = y,
            .y_stride = w.rows,
            .accumulate = adds,
            .row_invariant = true};
  }
  AdvanceLayerParams advance(const Layer& layer, std::int32_t rows) const {
    AdvanceLayerParams p;
    p.out = product(layer.out, mixed_, hidden_, rows, true);
    p.feed.norm = {hidden_, norm_, normed_, rows, s_.hidden, 1e-5F};
    p.feed.gate = product(layer.gate, normed_, gate_, rows, false);
    p.feed.up = product(layer.up, normed_, up_, rows, false);
    p.feed.down = product(layer.down, gate_, hidden_, rows, true);
    return p;
  }
  ProjectParams project(const Layer& layer, std::int32_t rows) const {
    ProjectParams p;
    p.norm = {hidden_, norm_, normed_, rows, s_.hidden, 1e-5F};
    p.q = product(layer.q, normed_, q_, rows, false);
    p.k = product(layer.k, normed_, k_, rows, false);
    p.v = product(layer.v, normed_, v_, rows, false);
    p.q_rope = {q_, s_.q(), rows, s_.q_heads, s_.head_dim, cos_, cos_};
    p.k_rope = {k_, s_.kv(), rows, s_.kv_heads, s_.head_dim, cos_, cos_};
    return p;
  }

  CudaBackend backend_{0};
  Shape s_;
  DeviceMemory& memory_;
  std::deque<DeviceBuffer> buffers_;
  std::vector<Layer> layers_;
  float *hidden_, *normed_, *mixed_, *gate_, *up_, *q_, *k_, *v_, *cos_, *norm_;
};

int run(int samples) {
  const char* separator = "\n";
  std::printf("{\"samples\": %d, \"runs\": [", samples);
  for (const Shape& shape : kShapes) {
    Bench bench(shape);
    for (const std::int32_t rows : {1, 4, 16, 32, 64}) {
      const LaunchTimes one = bench.layer_us(rows, true, samples);
      const LaunchTimes parts = bench.layer_us(rows, false, samples);
      std::printf(
          "%s {\"shape\": \"%s\", \"layer_mb\": %.1f, \"rows\": %d, \"us\": [%.1f, %.1f, %.1f], "
          "\"tb_per_second\": %.2f, \"one_by_one_us\": [%.1f, %.1f, %.1f]}",
          separator, shape.name, static_cast<double>(shape.layer_bytes()) / 1e6, rows, one.low,
          one.median, one.high, static_cast<double>(shape.layer_bytes()) / one.median / 1e6,
          parts.low, parts.median, parts.high);
      separator = ",\n";
    }
  }
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace twilight::cuda

int main(int argc, char** argv) {
  return twilight::cuda::run_benchmark(argc, argv, 21, twilight::cuda::run);
}
