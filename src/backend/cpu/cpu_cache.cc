#include <algorithm>
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/label_scores.h"
#include "quant/page_codec.h"

namespace twilight::cpu {
namespace {

// Tokens appended by one task.
constexpr std::int64_t kAppendTile = 16;
constexpr int kMaxHeadDim = 512;

// Rows of one (page, KV head), slot by slot where something lies between them.
void copy_rows(const PagedKvView& kv, const PagePlane& plane, std::byte* to,
               const std::byte* from) {
  const auto row = static_cast<std::size_t>(kv.head_dim * dtype_bytes(kv.dtype));
  if (plane.token_stride == kv.head_dim) {
    std::memcpy(to, from, row * static_cast<std::size_t>(kv.page_size));
    return;
  }
  const std::int64_t stride = plane.token_stride * dtype_bytes(kv.dtype);
  for (int slot = 0; slot < kv.page_size; ++slot) {
    std::memcpy(to + slot * stride, from + slot * stride, row);
  }
}

}  // namespace

void CpuBackend::do_append_kv(const AppendKvParams& params) {
  const PagedKvView& kv = params.kv;
  const std::int64_t head_dim = kv.head_dim;
  const std::int64_t tiles = (params.num_tokens + kAppendTile - 1) / kAppendTile;
  pool_.parallel_for(tiles, [&](std::int64_t tile, int) {
    const std::int64_t end = std::min<std::int64_t>((tile + 1) * kAppendTile, params.num_tokens);
    for (std::int64_t token = tile * kAppendTile; token < end; ++token) {
      const std::int64_t page = params.slots[token] / kv.page_size;
      const std::int64_t slot = params.slots[token] % kv.page_size;
      const float* k = params.k + token * params.k_token_stride;
      const float* v = params.v + token * params.v_token_stride;
      for (int head = 0; head < kv.num_kv_heads; ++head) {
        const int bytes = dtype_bytes(kv.dtype);
        index_.convert_row(kv.dtype, k + head * head_dim, head_dim,
                           kv.k_rows(page, head) + slot * kv.k.token_stride * bytes);
        index_.convert_row(kv.dtype, v + head * head_dim, head_dim,
                           kv.v_rows(page, head) + slot * kv.v.token_stride * bytes);
      }
    }
  });
}

void CpuBackend::do_seal_pages(const SealPagesParams& params) {
  const IndexFormat& format = params.index.format;
  if (format.summary == SummaryKind::kNone && format.key_bits == 0 && format.value_bits == 0) {
    return;
  }
  pool_.parallel_for(params.num_pages, [&](std::int64_t i, int) {
    alignas(kBufferAlignment) std::byte scratch[seal_scratch_bytes(kMaxHeadDim)];
    for (int head = 0; head < params.kv.num_kv_heads; ++head) {
      if (format.summary == SummaryKind::kLabels) {
        seal_labels(index_, params.kv, params.index, params.pages[i], head, scratch);
      }
      index_.seal_page(params.kv, params.index, params.pages[i], head, scratch);
    }
  });
}

// One task a head, pages in order: a page may be the source of a later copy.
void CpuBackend::do_copy_pages(const CopyPagesParams& params) {
  const PagedKvView& kv = params.kv;
  const KeyIndexView& index = params.index;
  pool_.parallel_for(kv.num_kv_heads, [&](std::int64_t head, int) {
    for (int i = 0; i < params.num_pages; ++i) {
      const std::int64_t from = params.from[i];
      const std::int64_t to = params.to[i];
      if (from == to) continue;
      copy_rows(kv, kv.k, kv.k_rows(to, head), kv.k_rows(from, head));
      copy_rows(kv, kv.v, kv.v_rows(to, head), kv.v_rows(from, head));
      copy_records(index, from, to, head, kv.page_size, kv.head_dim);
    }
  });
}

}  // namespace twilight::cpu
