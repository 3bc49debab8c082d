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

}  // namespace

void CpuBackend::do_linear(const LinearParams& params) {
  if (params.weight.quantised()) {
    fail(ErrorCode::kUnsupported, "cpu linear", "weight type, got ",
         weight_type_name(params.weight.blocks), ", accepted F32, F16, BF16");
  }
  if (params.num_rows > kMatvecMaxRows && !params.row_invariant) {
    matmul_.run(params);
    return;
  }
  for_ranges(pool_, params.weight.rows, params.weight.cols * dtype_bytes(params.weight.dtype), 4,
             [&](std::int64_t begin, std::int64_t end) { model_.matvec(params, begin, end); });
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
