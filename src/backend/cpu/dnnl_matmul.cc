#include "backend/cpu/dnnl_matmul.h"

#include <algorithm>

#include "core/check.h"
#include "core/thread_pool.h"

namespace twilight::cpu {
namespace {

// 256 x 64 with all of K in one call ran at 90 % of the bf16 peak on Zen 4 for K from 2048 to
// 14336; wider tiles gained nothing, 64 rows lost up to 20 % (W is packed again for every row
// tile).
constexpr std::int64_t kTileRows = 256;
constexpr std::int64_t kTileCols = 64;
// Row tiles of one task: a tile of W that has to be converted is used for this many rows.
constexpr std::int64_t kTaskRows = 2 * kTileRows;
// Rows of x held in the compute type at a time.
constexpr std::int64_t kBlockRows = 4 * kTaskRows;

void grow(Buffer& buffer, std::int64_t bytes) {
  if (static_cast<std::int64_t>(buffer.size()) < bytes) {
    buffer = Buffer(static_cast<std::size_t>(bytes));
  }
}

// y = tile + bias (+ y), for `rows` rows of `cols` columns.
void store_tile(const float* tile, std::int64_t rows, std::int64_t cols, const float* bias,
                bool accumulate, float* y, std::int64_t y_stride) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* from = tile + r * cols;
    float* to = y + r * y_stride;
    if (accumulate) {
      for (std::int64_t c = 0; c < cols; ++c) to[c] += from[c];
    } else {
      std::copy_n(from, cols, to);
    }
    if (bias != nullptr) {
      for (std::int64_t c = 0; c < cols; ++c) to[c] += bias[c];
    }
  }
}

}  // namespace

DnnlMatmul::DnnlMatmul(ThreadPool& pool, Isa isa)
    : pool_(pool),
      kernels_(prefill_kernels(isa)),
      blocks_(block_kernels(isa)),
      bf16_(prefers_bf16_gemm(isa)),
      workers_(static_cast<std::size_t>(pool.num_threads())) {}

void DnnlMatmul::run(const LinearParams& params) {
  require(params.weight.cols > 0 && params.weight.cols <= INT32_MAX, "linear",
          "weight columns, got ", params.weight.cols, ", accepted 1 to 2147483647");
  const bool bf16 = bf16_ && !params.full_precision;
  for (std::int64_t row = 0; row < params.num_rows; row += kBlockRows) {
    run_block(params, row, std::min<std::int64_t>(kBlockRows, params.num_rows - row), bf16);
  }
}

// `count` weights, whole blocks, in the compute type.
void DnnlMatmul::convert(const WeightView& weight, const std::byte* from, std::int64_t count,
                         bool bf16, std::byte* to) const {
  auto* half = reinterpret_cast<std::uint16_t*>(to);
  auto* full = reinterpret_cast<float*>(to);
  if (!weight.quantised()) {
    if (bf16) {
      kernels_.to_bf16(from, weight.dtype, count, half);
    } else {
      kernels_.to_f32(from, weight.dtype, count, full);
    }
    return;
  }
  if (!bf16) {
    blocks_.dequantise(weight.blocks, from, count, full);
    return;
  }
  constexpr std::int64_t kPart = 1024;  // whole blocks of any type; 4 KiB
  alignas(64) float wide[kPart];
  for (std::int64_t i = 0; i < count; i += kPart) {
    const std::int64_t some = std::min(kPart, count - i);
    blocks_.dequantise(weight.blocks, from, some, wide);
    kernels_.to_bf16(reinterpret_cast<const std::byte*>(wide), DType::kF32, some, half + i);
    from += weight_row_bytes(weight.blocks, some);
  }
}

void DnnlMatmul::run_block(const LinearParams& params, std::int64_t first_row, std::int64_t rows,
                           bool bf16) {
  const WeightView& w = params.weight;
  const std::int64_t k = w.cols;
  const std::int64_t element = bf16 ? 2 : 4;
  const bool x_in_place = !bf16 && params.x_stride == k;
  const bool w_in_place = w.type() == (bf16 ? WeightType::kBf16 : WeightType::kF32);
  const float* x = params.x + first_row * params.x_stride;

  if (!x_in_place) {
    grow(x_, rows * k * element);
    pool_.parallel_for(rows, [&](std::int64_t row, int) {
      const auto* from = reinterpret_cast<const std::byte*>(x + row * params.x_stride);
      if (bf16) {
        kernels_.to_bf16(from, DType::kF32, k, x_.as<std::uint16_t>() + row * k);
      } else {
        kernels_.to_f32(from, DType::kF32, k, x_.as<float>() + row * k);
      }
    });
  }
  const std::byte* a = x_in_place ? reinterpret_cast<const std::byte*>(x) : x_.data();

  const std::int64_t col_tiles = (w.rows + kTileCols - 1) / kTileCols;
  const std::int64_t row_tasks = (rows + kTaskRows - 1) / kTaskRows;
  pool_.parallel_for(col_tiles * row_tasks, [&](std::int64_t index, int worker_index) {
    Worker& worker = workers_[static_cast<std::size_t>(worker_index)];
    grow(worker.tile, kTileRows * kTileCols * 4);
    const std::int64_t col = index / row_tasks * kTileCols;
    const std::int64_t cols = std::min(kTileCols, w.rows - col);
    const std::byte* b = w.data + col * w.row_bytes();
    if (!w_in_place) {
      grow(worker.weight, kTileCols * k * element);
      convert(w, b, cols * k, bf16, worker.weight.data());
      b = worker.weight.data();
    }
    const std::int64_t begin = index % row_tasks * kTaskRows;
    const std::int64_t end = std::min(begin + kTaskRows, rows);
    for (std::int64_t row = begin; row < end; row += kTileRows) {
      const std::int64_t tile_rows = std::min(kTileRows, end - row);
      const GemmShape shape = {.m = static_cast<std::int32_t>(tile_rows),
                               .n = static_cast<std::int32_t>(cols),
                               .k = static_cast<std::int32_t>(k),
                               .bf16 = bf16,
                               .b_transposed = true,
                               .accumulate = false};
      worker.gemm.run(shape, a + row * k * element, b, worker.tile.as<float>());
      store_tile(worker.tile.as<float>(), tile_rows, cols,
                 params.bias == nullptr ? nullptr : params.bias + col, params.accumulate,
                 params.y + (first_row + row) * params.y_stride + col, params.y_stride);
    }
  });
}

}  // namespace twilight::cpu
