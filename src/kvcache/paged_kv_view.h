#ifndef TWILIGHT_KVCACHE_PAGED_KV_VIEW_H_
#define TWILIGHT_KVCACHE_PAGED_KV_VIEW_H_

#include <cstddef>
#include <cstdint>

#include "twilight/types.h"

namespace twilight {

/// K or V of one layer: a pool of pages with whatever strides its owner chose. Element (page, head,
/// slot, d) is at page * page_stride + head * head_stride + slot * token_stride + d, in elements.
struct PagePlane {
  std::byte* data = nullptr;
  std::int64_t page_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
};

/// The paged caches of B sequences in one layer. Owns nothing; kernels see this, never the pool.
/// A page holds P consecutive tokens of one sequence; it is sealed once full, open before.
struct PagedKvView {
  DType dtype = DType::kBf16;
  std::int32_t num_seqs = 0;  ///< B
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t page_size = 0;
  PagePlane k;
  PagePlane v;
  const std::int32_t* block_table = nullptr;  ///< [B, block_table_stride] physical page numbers
  std::int64_t block_table_stride = 0;
  const std::int32_t* seq_lens = nullptr;  ///< [B] N, tokens written so far
  /// The same lengths in host memory, where `seq_lens` is not; null where it is.
  const std::int32_t* host_seq_lens = nullptr;

  /// Address of slot 0 of (page, head); rows follow at token_stride elements.
  [[nodiscard]] constexpr std::byte* k_rows(std::int64_t page, std::int64_t head) const {
    return k.data + (page * k.page_stride + head * k.head_stride) * dtype_bytes(dtype);
  }
  [[nodiscard]] constexpr std::byte* v_rows(std::int64_t page, std::int64_t head) const {
    return v.data + (page * v.page_stride + head * v.head_stride) * dtype_bytes(dtype);
  }
  /// N for decisions made on the host.
  [[nodiscard]] constexpr std::int32_t host_len(std::int64_t seq) const {
    return host_seq_lens != nullptr ? host_seq_lens[seq] : seq_lens[seq];
  }
  [[nodiscard]] constexpr std::int32_t page_of(std::int64_t seq, std::int64_t page_idx) const {
    return block_table[seq * block_table_stride + page_idx];
  }
  [[nodiscard]] constexpr std::int32_t sealed_pages(std::int64_t seq) const {
    return seq_lens[seq] / page_size;
  }
  [[nodiscard]] constexpr std::int32_t total_pages(std::int64_t seq) const {
    return (seq_lens[seq] + page_size - 1) / page_size;
  }
};

}  // namespace twilight

#endif  // TWILIGHT_KVCACHE_PAGED_KV_VIEW_H_
