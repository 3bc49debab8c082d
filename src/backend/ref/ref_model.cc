#include <cmath>
#include <vector>

#include "backend/ref/ref_backend.h"
#include "backend/ref/ref_rows.h"

namespace twilight::ref {

void RefBackend::do_linear(const LinearParams& params) {
  const WeightView& weight = params.weight;
  std::vector<float> w(static_cast<std::size_t>(weight.cols));
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    const std::byte* at = weight.data + row * weight.row_bytes();
    if (weight.quantised()) {
      dequantise_row(weight.blocks, at, w);
    } else {
      load_row(weight.dtype, at, w);
    }
    for (std::int64_t m = 0; m < params.num_rows; ++m) {
      double sum = dot(params.x + m * params.x_stride, w);
      if (params.bias != nullptr) sum += double{params.bias[row]};
      float& y = params.y[m * params.y_stride + row];
      if (params.accumulate) sum += double{y};
      y = static_cast<float>(sum);
    }
  }
}

void RefBackend::do_rms_norm(const RmsNormParams& params) {
  for (std::int64_t m = 0; m < params.num_rows; ++m) {
    const float* x = params.x + m * params.hidden;
    float* y = params.y + m * params.hidden;
    double squares = 0;
    for (std::int64_t i = 0; i < params.hidden; ++i) squares += double{x[i]} * double{x[i]};
    const double mean = squares / static_cast<double>(params.hidden);
    const double inverse = 1.0 / std::sqrt(mean + double{params.eps});
    for (std::int64_t i = 0; i < params.hidden; ++i) {
      y[i] = static_cast<float>(double{x[i]} * inverse * double{params.weight[i]});
    }
  }
}

void RefBackend::do_rope(const RopeParams& params) {
  const std::int64_t half = params.head_dim / 2;
  for (std::int64_t token = 0; token < params.num_tokens; ++token) {
    const float* cos = params.cos + token * half;
    const float* sin = params.sin + token * half;
    for (std::int64_t head = 0; head < params.num_heads; ++head) {
      float* x = params.x + token * params.token_stride + head * params.head_dim;
      for (std::int64_t d = 0; d < half; ++d) {
        const double a = x[d];
        const double b = x[d + half];
        x[d] = static_cast<float>(a * double{cos[d]} - b * double{sin[d]});
        x[d + half] = static_cast<float>(b * double{cos[d]} + a * double{sin[d]});
      }
    }
  }
}

void RefBackend::do_silu_mul(const SiluMulParams& params) {
  for (std::int64_t i = 0; i < params.count; ++i) {
    const double gate = params.gate[i];
    const double silu = gate / (1.0 + std::exp(-gate));
    params.y[i] = static_cast<float>(silu * double{params.up[i]});
  }
}

}  // namespace twilight::ref
