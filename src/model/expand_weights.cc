#include "model/expand_weights.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "core/float16.h"

namespace twilight {
namespace {

// Weights of one task: whole blocks of every type, a few hundred microseconds.
constexpr std::int64_t kTaskWeights = std::int64_t{1} << 16;

class Expander {
 public:
  Expander(ThreadPool& pool, std::vector<Buffer>& memory) : pool_(pool), memory_(memory) {}

  void expand(TensorView& tensor) {
    if (!tensor || !is_quantised(tensor.type)) return;
    const auto [known, is_new] = done_.try_emplace(tensor.data);  // tied tensors share their bytes
    if (is_new) known->second = convert(tensor);
    tensor.data = known->second;
    tensor.bytes = tensor.elements() * 2;
    tensor.type = WeightType::kF16;
  }

 private:
  const std::byte* convert(const TensorView& tensor) {
    const std::int64_t count = tensor.elements();
    memory_.emplace_back(static_cast<std::size_t>(count) * 2);
    std::byte* const to = memory_.back().data();
    std::atomic<bool> fits{true};
    pool_.parallel_for((count + kTaskWeights - 1) / kTaskWeights, [&](std::int64_t task, int) {
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
      std::memcpy(to + begin * 2, half.data(), half.size() * 2);
    });
    if (!fits) {
      fail(ErrorCode::kUnsupported, "weights", "tensor '", tensor.name,
           "', got a weight beyond the range of f16, accepted up to 65504");
    }
    return to;
  }

  ThreadPool& pool_;
  std::vector<Buffer>& memory_;
  std::map<const std::byte*, const std::byte*> done_;
};

}  // namespace

ModelWeights expand_quantised(const ModelWeights& weights, ThreadPool& pool) {
  ModelWeights out = weights;
  auto memory = std::make_shared<std::vector<Buffer>>();
  Expander expander(pool, *memory);
  expander.expand(out.embed);
  expander.expand(out.final_norm);
  expander.expand(out.lm_head);
  for (LayerWeights& layer : out.layers) {
    for (TensorView* tensor :
         {&layer.input_norm, &layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
          &layer.q_bias, &layer.k_bias, &layer.v_bias, &layer.o_bias, &layer.q_norm, &layer.k_norm,
          &layer.post_norm, &layer.gate_proj, &layer.up_proj, &layer.down_proj, &layer.gate_bias,
          &layer.up_bias, &layer.down_bias}) {
      expander.expand(*tensor);
    }
  }
  if (!memory->empty()) out.expanded = std::move(memory);
  return out;
}

}  // namespace twilight
