#include <vector>

#include "backend/ref/ref_backend.h"
#include "backend/ref/ref_rows.h"
#include "quant/page_codec.h"

namespace twilight::ref {
namespace {

void copy_rows(const PagedKvView& kv, const PagePlane& plane, std::int64_t from, std::int64_t to) {
  const std::int64_t element = dtype_bytes(kv.dtype);
  for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
    for (std::int64_t slot = 0; slot < kv.page_size; ++slot) {
      const std::int64_t inside = head * plane.head_stride + slot * plane.token_stride;
      std::memcpy(plane.data + (to * plane.page_stride + inside) * element,
                  plane.data + (from * plane.page_stride + inside) * element,
                  static_cast<std::size_t>(kv.head_dim * element));
    }
  }
}

}  // namespace

void RefBackend::do_append_kv(const AppendKvParams& params) {
  const PagedKvView& kv = params.kv;
  const std::int64_t element = dtype_bytes(kv.dtype);
  for (std::int64_t token = 0; token < params.num_tokens; ++token) {
    const std::int64_t page = params.slots[token] / kv.page_size;
    const std::int64_t slot = params.slots[token] % kv.page_size;
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      const float* k = params.k + token * params.k_token_stride + head * kv.head_dim;
      const float* v = params.v + token * params.v_token_stride + head * kv.head_dim;
      std::byte* k_out = kv.k_rows(page, head) + slot * kv.k.token_stride * element;
      std::byte* v_out = kv.v_rows(page, head) + slot * kv.v.token_stride * element;
      for (std::int64_t d = 0; d < kv.head_dim; ++d) {
        store_element(kv.dtype, k_out + d * element, k[d]);
        store_element(kv.dtype, v_out + d * element, v[d]);
      }
    }
  }
}

void RefBackend::do_seal_pages(const SealPagesParams& params) {
  const PagedKvView& kv = params.kv;
  const KeyIndexView& index = params.index;
  const auto dim = static_cast<std::size_t>(kv.head_dim);
  std::vector<float> keys(static_cast<std::size_t>(kv.page_size) * dim);
  std::vector<float> values(keys.size());
  for (std::int64_t i = 0; i < params.num_pages; ++i) {
    const std::int64_t page = params.pages[i];
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      for (std::int64_t slot = 0; slot < kv.page_size; ++slot) {
        load_row(kv.dtype, kv.k_rows(page, head) + slot * kv.k.token_stride * dtype_bytes(kv.dtype),
                 std::span(keys).subspan(static_cast<std::size_t>(slot) * dim, dim));
        if (index.format.value_bits == 0) continue;
        load_row(kv.dtype, kv.v_rows(page, head) + slot * kv.v.token_stride * dtype_bytes(kv.dtype),
                 std::span(values).subspan(static_cast<std::size_t>(slot) * dim, dim));
      }
      encode_page(index.format, kv.page_size, kv.head_dim, keys, values,
                  page_records(index, page, head, kv.page_size, kv.head_dim));
    }
  }
}

void RefBackend::do_copy_pages(const CopyPagesParams& params) {
  const PagedKvView& kv = params.kv;
  const KeyIndexView& index = params.index;
  for (std::int64_t i = 0; i < params.num_pages; ++i) {
    const std::int64_t from = params.from[i];
    const std::int64_t to = params.to[i];
    if (from == to) continue;
    copy_rows(kv, kv.k, from, to);
    copy_rows(kv, kv.v, from, to);
    for (std::int64_t head = 0; head < kv.num_kv_heads; ++head) {
      copy_records(index, from, to, head, kv.page_size, kv.head_dim);
    }
  }
}

}  // namespace twilight::ref
