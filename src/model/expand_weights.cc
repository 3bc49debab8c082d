#include "model/expand_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/float16.h"

namespace twilight {
namespace {

// Weights of one task: whole blocks of every type, a few hundred microseconds.
constexpr std::int64_t kTaskWeights = std::int64_t{1} << 16;

}  // namespace

Buffer expand_quantised(const TensorView& tensor, ThreadPool& pool) {
  const std::int64_t count = tensor.elements();
  Buffer out(static_cast<std::size_t>(count) * 2);
  std::atomic<bool> fits{true};
  pool.parallel_for((count + kTaskWeights - 1) / kTaskWeights, [&](std::int64_t task, int) {
    const std::int64_t begin = task * kTaskWeights;
    const std::int64_t size = std::min(kTaskWeights, count - begin);
    std::vector<float> wide(static_cast<std::size_t>(size));
    std::vector<std::uint16_t> half(static_cast<std::size_t>(size));
    const std::int64_t block = begin / weight_block_length(tensor.type);
    dequantise_row(tensor.type, tensor.data + block * weight_block_bytes(tensor.type), wide);
    for (std::size_t i = 0; i < wide.size(); ++i) {
      half[i] = f32_to_f16(wide[i]);
      if (!std::isfinite(f16_to_f32(half[i]))) fits.store(false, std::memory_order_relaxed);
    }
    std::memcpy(out.data() + begin * 2, half.data(), half.size() * 2);
  });
  if (!fits) {
    fail(ErrorCode::kUnsupported, "weights", "tensor '", tensor.name,
         "', got a weight beyond the range of f16, accepted up to 65504");
  }
  return out;
}

}  // namespace twilight
