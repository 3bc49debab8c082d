#include "backend/cpu/prefill_attention.h"

#include <algorithm>
#include <limits>
#include <numbers>

#include "core/check.h"
#include "core/thread_pool.h"

namespace twilight::cpu {
namespace {

// Scores (f32) and weights (bf16) of one tile with its K, V, Q and O come to about 0.7 MiB at D =
// 128 and stay in an L2 cache of 1 MiB. Zen 4, one core, D = 128: 128 x 256 ran at 167 GF/s, 256 x
// 256 at 181, 256 x 512 at 181, 512 x 256 at 185 (oneDNN packs K and V anew for each call, the
// softmax takes a tenth); more rows would cost balance for little.
constexpr std::int64_t kTileRows = 256;
constexpr std::int64_t kTileKeys = 256;
// Keys of the last, partly masked tile are cut to this step: fewer masked products, few shapes.
constexpr std::int64_t kKeyStep = 64;
// Rows of a last query tile are rounded up to this step (rows of zeros), for the same reason.
constexpr std::int64_t kRowStep = 16;
// Gathered keys and values held at a time.
constexpr std::int64_t kBlockBytes = std::int64_t{32} << 20;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t step) {
  return (n + step - 1) / step * step;
}

void grow(Buffer& buffer, std::int64_t bytes) {
  if (static_cast<std::int64_t>(buffer.size()) < bytes) {
    buffer = Buffer(static_cast<std::size_t>(bytes));
  }
}

}  // namespace

struct PrefillAttention::Plan {
  bool bf16;
  std::int64_t element;  // bytes of the compute type
  std::int64_t head_dim;
  std::int64_t kv_heads;
  std::int64_t group;
  std::int64_t tokens;       // T
  std::int64_t total;        // N
  std::int64_t start;        // N - T
  std::int64_t tile_tokens;  // query tokens of one tile
  std::int64_t tile_rows;    // its rows, rounded up
  std::int64_t query_tiles;
  std::int64_t block_keys;  // a multiple of kTileKeys

  Plan(const AttendPrefillParams& params, bool use_bf16)
      : bf16(use_bf16),
        element(use_bf16 ? 2 : 4),
        head_dim(params.kv.head_dim),
        kv_heads(params.kv.num_kv_heads),
        group(params.num_q_heads / params.kv.num_kv_heads),
        tokens(params.num_tokens),
        total(params.kv.seq_lens[0]),
        start(total - tokens),
        tile_tokens(std::max<std::int64_t>(1, kTileRows / group)),
        tile_rows(round_up(std::min(tile_tokens, tokens) * group, kRowStep)),
        query_tiles((tokens + tile_tokens - 1) / tile_tokens) {
    const std::int64_t bytes_per_key = 2 * kv_heads * head_dim * element;
    block_keys = std::max(kTileKeys, kBlockBytes / bytes_per_key / kTileKeys * kTileKeys);
    block_keys = std::min(block_keys, round_up(total, kTileKeys));
  }

  [[nodiscard]] std::int64_t state_rows() const { return kv_heads * query_tiles * tile_rows; }
};

PrefillAttention::PrefillAttention(ThreadPool& pool, Isa isa)
    : pool_(pool),
      kernels_(prefill_kernels(isa)),
      bf16_(prefers_bf16_gemm(isa)),
      workers_(static_cast<std::size_t>(pool.num_threads())) {}

void PrefillAttention::run(const AttendPrefillParams& params) {
  require(params.kv.head_dim > 0 && params.kv.head_dim % 16 == 0, "attend_prefill",
          "head_dim, got ", params.kv.head_dim, ", accepted multiples of 16");
  require(params.scale > 0, "attend_prefill", "scale, got ", params.scale, ", accepted above 0");
  if (params.num_tokens == 0) return;
  const Plan plan(params, bf16_ && !params.full_precision);
  grow(keys_, plan.kv_heads * plan.block_keys * plan.head_dim * plan.element);
  grow(values_, plan.kv_heads * plan.block_keys * plan.head_dim * plan.element);
  grow(state_, 2 * plan.state_rows() * 4);

  for (std::int64_t begin = 0; begin < plan.total; begin += plan.block_keys) {
    const std::int64_t keys = std::min(plan.block_keys, plan.total - begin);
    const std::int64_t key_tiles = (keys + kTileKeys - 1) / kTileKeys;
    pool_.parallel_for(plan.kv_heads * key_tiles, [&](std::int64_t index, int) {
      gather_tile(params, plan, begin, index / key_tiles, index % key_tiles);
    });
    // Later tokens see more keys: they go first, so that the last tasks to run are short.
    pool_.parallel_for(plan.query_tiles * plan.kv_heads, [&](std::int64_t index, int worker) {
      const std::int64_t query_tile = plan.query_tiles - 1 - index / plan.kv_heads;
      attend_tile(params, plan, begin, index % plan.kv_heads, query_tile,
                  workers_[static_cast<std::size_t>(worker)]);
    });
  }
}

void PrefillAttention::gather_tile(const AttendPrefillParams& params, const Plan& plan,
                                   std::int64_t block_begin, std::int64_t head, std::int64_t tile) {
  const PagedKvView& kv = params.kv;
  const std::int64_t d = plan.head_dim;
  const std::int64_t first = block_begin + tile * kTileKeys;
  const std::int64_t end = std::min(first + kTileKeys, plan.total);
  const std::int64_t offset = (head * plan.block_keys + tile * kTileKeys) * d * plan.element;
  const auto convert = [&](const PagePlane& plane, const std::byte* rows, std::int64_t slot,
                           std::int64_t count, std::byte* to) {
    const std::int64_t bytes = dtype_bytes(kv.dtype);
    const bool dense = plane.token_stride == d;
    const std::int64_t pieces = dense ? 1 : count;
    const std::int64_t piece = dense ? count * d : d;
    for (std::int64_t i = 0; i < pieces; ++i) {
      const std::byte* from = rows + (slot + i) * plane.token_stride * bytes;
      std::byte* out = to + i * piece * plan.element;
      if (plan.bf16) {
        kernels_.to_bf16(from, kv.dtype, piece, reinterpret_cast<std::uint16_t*>(out));
      } else {
        kernels_.to_f32(from, kv.dtype, piece, reinterpret_cast<float*>(out));
      }
    }
  };
  std::byte* k_out = keys_.data() + offset;
  std::byte* v_out = values_.data() + offset;
  for (std::int64_t token = first; token < end;) {
    const std::int64_t page = kv.page_of(0, token / kv.page_size);
    const std::int64_t slot = token % kv.page_size;
    const std::int64_t count = std::min(kv.page_size - slot, end - token);
    const std::int64_t at = (token - first) * d * plan.element;
    convert(kv.k, kv.k_rows(page, head), slot, count, k_out + at);
    convert(kv.v, kv.v_rows(page, head), slot, count, v_out + at);
    token += count;
  }
  // Products run to the next step of keys: masked weights are 0, and 0 times these rows must be 0.
  const std::int64_t used = (end - first) * d * plan.element;
  const std::int64_t padded = round_up(end - first, kKeyStep) * d * plan.element;
  std::fill(k_out + used, k_out + padded, std::byte{0});
  std::fill(v_out + used, v_out + padded, std::byte{0});
}

void PrefillAttention::attend_tile(const AttendPrefillParams& params, const Plan& plan,
                                   std::int64_t block_begin, std::int64_t head,
                                   std::int64_t query_tile, Worker& worker) {
  const std::int64_t d = plan.head_dim;
  const std::int64_t first = query_tile * plan.tile_tokens;
  const std::int64_t tokens = std::min(plan.tile_tokens, plan.tokens - first);
  const std::int64_t visible = plan.start + first + tokens;  // to the last token of the tile
  if (visible <= block_begin) return;
  const std::int64_t end = std::min(visible, block_begin + plan.block_keys);
  const std::int64_t rows = round_up(tokens * plan.group, kRowStep);

  const std::int64_t max_rows = round_up(std::max(kTileRows, plan.group), kRowStep);
  const std::int64_t scores_bytes = max_rows * kTileKeys * 4;
  const std::int64_t weights_bytes = plan.bf16 ? max_rows * kTileKeys * 2 : 0;
  const std::int64_t q_bytes = max_rows * d * plan.element;
  grow(worker.scratch, scores_bytes + weights_bytes + q_bytes + max_rows * d * 4);
  std::byte* base = worker.scratch.data();
  auto* scores = reinterpret_cast<float*>(base);
  // The f32 weights take the place of the scores.
  void* weights = plan.bf16 ? static_cast<void*>(base + scores_bytes) : scores;
  std::byte* q = base + scores_bytes + weights_bytes;
  auto* out = reinterpret_cast<float*>(q + q_bytes);

  float* max = state_.as<float>() + (head * plan.query_tiles + query_tile) * plan.tile_rows;
  float* sum = max + plan.state_rows();

  // The G heads of a token lie side by side, in q and in out.
  const std::int64_t token_floats = plan.group * d;
  const std::int64_t head_offset = head * token_floats;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* from = params.q + (first + t) * params.q_token_stride + head_offset;
    const auto* bytes = reinterpret_cast<const std::byte*>(from);
    std::byte* to = q + t * token_floats * plan.element;
    if (plan.bf16) {
      kernels_.to_bf16(bytes, DType::kF32, token_floats, reinterpret_cast<std::uint16_t*>(to));
    } else {
      kernels_.to_f32(bytes, DType::kF32, token_floats, reinterpret_cast<float*>(to));
    }
  }
  std::fill(q + tokens * token_floats * plan.element, q + rows * d * plan.element, std::byte{0});
  if (block_begin == 0) {
    std::fill_n(out, rows * d, 0.0F);
    std::fill_n(max, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, rows, 0.0F);
  } else {
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::copy_n(params.out + (first + t) * params.out_token_stride + head_offset, token_floats,
                  out + t * token_floats);
    }
    std::fill(out + tokens * token_floats, out + rows * d, 0.0F);
  }

  const float scale_log2 = params.scale * std::numbers::log2e_v<float>;
  for (std::int64_t key = block_begin; key < end; key += kTileKeys) {
    const std::int64_t cols = round_up(std::min(kTileKeys, end - key), kKeyStep);
    const std::int64_t offset = (head * plan.block_keys + (key - block_begin)) * d * plan.element;
    const GemmShape scores_shape = {.m = static_cast<std::int32_t>(rows),
                                    .n = static_cast<std::int32_t>(cols),
                                    .k = static_cast<std::int32_t>(d),
                                    .bf16 = plan.bf16,
                                    .b_transposed = true,
                                    .accumulate = false};
    worker.gemm.run(scores_shape, q, keys_.data() + offset, scores);

    const SoftmaxTile tile = {.scores = scores,
                              .weights = weights,
                              .out = out,
                              .max = max,
                              .sum = sum,
                              .first_visible = plan.start + first + 1 - key,
                              .rows = static_cast<std::int32_t>(rows),
                              .cols = static_cast<std::int32_t>(cols),
                              .head_dim = static_cast<std::int32_t>(d),
                              .group = static_cast<std::int32_t>(plan.group),
                              .scale_log2 = scale_log2};
    if (plan.bf16) {
      kernels_.softmax_bf16(tile);
    } else {
      kernels_.softmax_f32(tile);
    }

    const GemmShape values_shape = {.m = static_cast<std::int32_t>(rows),
                                    .n = static_cast<std::int32_t>(d),
                                    .k = static_cast<std::int32_t>(cols),
                                    .bf16 = plan.bf16,
                                    .b_transposed = false,
                                    .accumulate = true};
    worker.gemm.run(values_shape, weights, values_.data() + offset, out);
  }

  const bool last = end == visible;
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* to = params.out + (first + t) * params.out_token_stride + head_offset;
    for (std::int64_t g = 0; g < plan.group; ++g) {
      const std::int64_t row = t * plan.group + g;
      const float factor = last ? 1.0F / sum[row] : 1.0F;
      for (std::int64_t i = 0; i < d; ++i) to[g * d + i] = out[row * d + i] * factor;
    }
  }
}

}  // namespace twilight::cpu
