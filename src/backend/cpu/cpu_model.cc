#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "core/check.h"

namespace twilight::cpu {
namespace {

// A task this size outlasts the hand-over between threads many times and still leaves enough tasks
// to balance.
constexpr std::int64_t kTaskBytes = 64 << 10;

// Calls `range(begin, end)` over [0, count) in pieces of about kTaskBytes, a multiple of `step`.
template <typename Range>
void for_ranges(ThreadPool& pool, std::int64_t count, std::int64_t bytes_each, std::int64_t step,
                const Range& range) {
  const std::int64_t wanted =
      std::max<std::int64_t>(kTaskBytes / std::max<std::int64_t>(bytes_each, 1), 1);
  const std::int64_t size = (wanted + step - 1) / step * step;
  pool.parallel_for((count + size - 1) / size,
                    [&](std::int64_t i, int) { range(i * size, std::min(count, (i + 1) * size)); });
}

// Tasks of a product. A task costs half to one microsecond beside its bytes, the time of 10 to 20
// KB of weights: it is handed out across caches, and its stream starts cold. The last one keeps the
// other threads waiting. So two equal tasks a thread, within these bounds (four took 10 % longer
// over a decode step of a 135M model in Q4_1). Rows are independent: how they are cut changes no
// result.
constexpr std::int64_t kTasksPerThread = 2;
constexpr std::int64_t kLeastRowTaskBytes = 32 << 10;
constexpr std::int64_t kMostRowTaskBytes = 256 << 10;

template <typename Range>
void for_weight_rows(ThreadPool& pool, const WeightView& weight, const Range& range) {
  const std::int64_t bytes = weight.rows * weight.row_bytes();
  const std::int64_t wanted = std::clamp(bytes / (kTasksPerThread * pool.num_threads()),
                                         kLeastRowTaskBytes, kMostRowTaskBytes);
  const std::int64_t tasks =
      std::clamp<std::int64_t>((bytes + wanted - 1) / wanted, 1, weight.rows);
  const std::int64_t size = (weight.rows + tasks - 1) / tasks;
  pool.parallel_for((weight.rows + size - 1) / size, [&](std::int64_t i, int worker) {
    range(i * size, std::min(weight.rows, (i + 1) * size), worker);
  });
}

void grow(Buffer& buffer, std::int64_t bytes) {
  if (static_cast<std::int64_t>(buffer.size()) < bytes) {
    buffer = Buffer(static_cast<std::size_t>(bytes));
  }
}

}  // namespace

void CpuBackend::do_linear(const LinearParams& params) {
  const bool bytes = params.weight.quantised() && !params.full_precision;
  const std::int32_t few = bytes ? kBlockMatvecMaxRows : kMatvecMaxRows;
  if (params.num_rows > few && !params.row_invariant) {
    matmul_.run(params);
    return;
  }
  if (params.weight.quantised()) {
    bytes ? linear_of_blocks(params) : linear_of_blocks_in_f32(params);
    return;
  }
  for_weight_rows(pool_, params.weight, [&](std::int64_t begin, std::int64_t end, int) {
    model_.matvec(params, begin, end);
  });
}

void CpuBackend::linear_of_blocks(const LinearParams& params) {
  const WeightView& weight = params.weight;
  const std::int64_t input_bytes = block_input_bytes(weight.cols);
  grow(block_inputs_, params.num_rows * input_bytes);
  const auto quantise = [&](std::int64_t row, int) {
    blocks_.quantise(weight.blocks, params.x + row * params.x_stride, weight.cols,
                     block_inputs_.data() + row * input_bytes);
  };
  if (params.num_rows == 1) {
    quantise(0, 0);
  } else {
    pool_.parallel_for(params.num_rows, quantise);
  }
  for_weight_rows(pool_, weight, [&](std::int64_t begin, std::int64_t end, int) {
    blocks_.matvec(params, block_inputs_.data(), begin, end);
  });
}

void CpuBackend::linear_of_blocks_in_f32(const LinearParams& params) {
  const WeightView& weight = params.weight;
  const auto scratch_bytes =
      static_cast<std::int64_t>(align_up(static_cast<std::size_t>(weight.cols) * sizeof(float)));
  grow(block_inputs_, pool_.num_threads() * scratch_bytes);
  for_weight_rows(pool_, weight, [&](std::int64_t begin, std::int64_t end, int worker) {
    auto* wide = reinterpret_cast<float*>(block_inputs_.data() + worker * scratch_bytes);
    LinearParams one = params;
    one.weight = {reinterpret_cast<const std::byte*>(wide), DType::kF32, 1, weight.cols};
    for (std::int64_t row = begin; row < end; ++row) {
      blocks_.dequantise(weight.blocks, weight.data + row * weight.row_bytes(), weight.cols, wide);
      one.bias = params.bias == nullptr ? nullptr : params.bias + row;
      one.y = params.y + row;
      model_.matvec(one, 0, 1);
    }
  });
}

void CpuBackend::do_rms_norm(const RmsNormParams& params) {
  for_ranges(pool_, params.num_rows, 2 * params.hidden * std::int64_t{sizeof(float)}, 1,
             [&](std::int64_t begin, std::int64_t end) { model_.rms_norm(params, begin, end); });
}

void CpuBackend::do_rope(const RopeParams& params) {
  for_ranges(pool_, params.num_tokens,
             std::int64_t{params.num_heads} * params.head_dim * std::int64_t{sizeof(float)}, 1,
             [&](std::int64_t begin, std::int64_t end) { model_.rope(params, begin, end); });
}

void CpuBackend::do_silu_mul(const SiluMulParams& params) {
  for_ranges(pool_, params.count, 3 * std::int64_t{sizeof(float)}, 64,
             [&](std::int64_t begin, std::int64_t end) { model_.silu_mul(params, begin, end); });
}

}  // namespace twilight::cpu
