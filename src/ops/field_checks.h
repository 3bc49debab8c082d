#ifndef TWILIGHT_OPS_FIELD_CHECKS_H_
#define TWILIGHT_OPS_FIELD_CHECKS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/check.h"
#include "ops/params.h"
#include "ops/validate.h"

namespace twilight {

/// Checks of single fields, with the op's name for the message.
struct FieldChecks {
  const char* op;

  void pointer(const char* field, const void* value) const {
    require(value != nullptr, op, field, ", got null, accepted a valid pointer");
  }
  void at_least(const char* field, std::int64_t value, std::int64_t least) const {
    require(value >= least, op, field, ", got ", value, ", accepted ", least, " or more");
  }
  void in_range(const char* field, std::int64_t value, std::int64_t lo, std::int64_t hi) const {
    require(value >= lo && value <= hi, op, field, ", got ", value, ", accepted ", lo, " to ", hi);
  }
  void scale(float value) const {
    require(std::isfinite(value) && value > 0, op, "scale, got ", value,
            ", accepted finite numbers above 0");
  }
  void dtype(const char* field, DType value) const {
    in_range(field, static_cast<std::int64_t>(value), 0, 2);
  }

  /// Shapes every op needs.
  void shape(const PagedKvView& kv) const {
    at_least("kv.num_seqs", kv.num_seqs, 0);
    at_least("kv.num_kv_heads", kv.num_kv_heads, 1);
    in_range("kv.page_size", kv.page_size, 1, kMaxPageSize);
    in_range("kv.head_dim", kv.head_dim, 1, kMaxHeadDim);
    dtype("kv.dtype", kv.dtype);
  }

  void plane(const char* name, const PagePlane& plane, const PagedKvView& kv) const {
    require(plane.data != nullptr, op, name, ".data, got null, accepted a valid pointer");
    const auto stride = [&](const char* field, std::int64_t value, bool used) {
      require(!used || value >= kv.head_dim, op, name, field, ", got ", value, ", accepted ",
              kv.head_dim, " or more");
    };
    stride(".token_stride", plane.token_stride, kv.page_size > 1);
    stride(".head_stride", plane.head_stride, kv.num_kv_heads > 1);
    stride(".page_stride", plane.page_stride, true);
  }
  void k(const PagedKvView& kv) const { plane("kv.k", kv.k, kv); }
  void v(const PagedKvView& kv) const { plane("kv.v", kv.v, kv); }

  void subset(const SeqSubset& seqs, const PagedKvView& kv) const {
    in_range("seqs.count", seqs.count, 0, kv.num_seqs);
    if (seqs.ids == nullptr) return;
    std::int32_t least = 0;
    for (std::int32_t i = 0; i < seqs.count; ++i) {
      require(seqs.ids[i] >= least && seqs.ids[i] < kv.num_seqs, op, "seqs.ids, got ", seqs.ids[i],
              " at ", i, ", accepted ascending numbers below ", kv.num_seqs);
      least = seqs.ids[i] + 1;
    }
  }

  void lengths(const SeqSubset& seqs, const PagedKvView& kv) const {
    if (seqs.count == 0) return;
    pointer("kv.seq_lens", kv.seq_lens);
    for (std::int32_t i = 0; i < seqs.count; ++i) {
      at_least("kv.seq_lens", kv.host_len(seqs.at(i)), 0);
    }
  }

  /// Lengths, and a block table wide enough for them.
  void table(const SeqSubset& seqs, const PagedKvView& kv) const {
    lengths(seqs, kv);
    std::int64_t pages = 0;
    for (std::int32_t i = 0; i < seqs.count; ++i) {
      pages = std::max<std::int64_t>(pages,
                                     (kv.host_len(seqs.at(i)) + kv.page_size - 1) / kv.page_size);
    }
    if (pages == 0) return;
    pointer("kv.block_table", kv.block_table);
    if (kv.num_seqs > 1) at_least("kv.block_table_stride", kv.block_table_stride, pages);
  }

  void query(const QueryView& q, const PagedKvView& kv) const {
    pointer("q.data", q.data);
    heads("q.num_heads", q.num_heads, kv);
    if (kv.num_seqs > 1) {
      at_least("q.seq_stride", q.seq_stride, std::int64_t{q.num_heads} * kv.head_dim);
    }
  }

  void heads(const char* field, std::int32_t num_heads, const PagedKvView& kv) const {
    require(num_heads > 0 && num_heads % kv.num_kv_heads == 0, op, field, ", got ", num_heads,
            ", accepted positive multiples of the ", kv.num_kv_heads, " KV heads");
  }

  void index_plane(const char* name, const std::byte* data, std::int64_t page_stride,
                   std::int64_t head_stride, std::int64_t record_bytes,
                   const PagedKvView& kv) const {
    require(data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 16 == 0, op, name, ", got ",
            static_cast<const void*>(data), ", accepted 16-byte aligned pointers");
    const auto stride = [&](const char* field, std::int64_t value) {
      require(value >= record_bytes && value % 16 == 0, op, name, field, ", got ", value,
              ", accepted multiples of 16 from ", record_bytes);
    };
    if (kv.num_kv_heads > 1) stride(" head stride", head_stride);
    stride(" page stride", page_stride);
  }

  void format(const IndexFormat& format, const PagedKvView& kv) const {
    in_range("index.format.summary", static_cast<std::int64_t>(format.summary), 0, 6);
    in_range("index.format.layout", static_cast<std::int64_t>(format.layout), 0, 1);
    require(format.key_bits == 0 || format.key_bits == 2 || format.key_bits == 4 ||
                format.key_bits == 8,
            op, "index.format.key_bits, got ", format.key_bits, ", accepted 0, 2, 4 or 8");
    require(format.value_bits == 0 || format.value_bits == 4, op, "index.format.value_bits, got ",
            format.value_bits, ", accepted 0 or 4");
    if (format.summary == SummaryKind::kLabels) {
      const std::int32_t labels = format.label_channels;
      require(labels >= kLabelUnit && labels <= std::min(kMaxLabels, kv.head_dim) &&
                  labels % kLabelUnit == 0,
              op, "index.format.label_channels, got ", labels, ", accepted multiples of ",
              kLabelUnit, " up to ", std::min(kMaxLabels, kv.head_dim));
    }
    const int unit = head_dim_unit(format);
    require(kv.head_dim % unit == 0, op, "kv.head_dim, got ", kv.head_dim,
            ", accepted multiples of ", unit, " with this index format");
  }

  void summaries(const KeyIndexView& index, const PagedKvView& kv) const {
    index_plane("index.summaries", index.summaries, index.summary_page_stride,
                index.summary_head_stride,
                summary_record_bytes(index.format, kv.page_size, kv.head_dim), kv);
    if (index.format.summary != SummaryKind::kLabels) return;
    pointer("index.labels", index.labels);
    for (std::int64_t i = 0; i < std::int64_t{kv.num_kv_heads} * index.format.label_channels; ++i) {
      in_range("index.labels", index.labels[i], 0, kv.head_dim - 1);
    }
  }

  void estimates(const KeyIndexView& index, const PagedKvView& kv) const {
    index_plane("index.estimates", index.estimates, index.estimate_page_stride,
                index.estimate_head_stride,
                estimate_record_bytes(index.format, kv.page_size, kv.head_dim), kv);
  }

  void page_params(const KeyIndexView& index, const PagedKvView& kv) const {
    if (!index.format.has_params()) return;
    index_plane("index.params", index.params, index.params_page_stride, index.params_head_stride,
                sizeof(PageParams), kv);
  }

  void value_means(const KeyIndexView& index, const PagedKvView& kv) const {
    index_plane("index.value_means", index.value_means, index.value_page_stride,
                index.value_head_stride, nibble_bytes(kv.head_dim), kv);
  }

  /// The planes the format names.
  void index(const KeyIndexView& index, const PagedKvView& kv) const {
    format(index.format, kv);
    if (index.format.summary != SummaryKind::kNone) summaries(index, kv);
    if (index.format.key_bits != 0) estimates(index, kv);
    if (index.format.value_bits != 0) value_means(index, kv);
    page_params(index, kv);
  }

  void forced(const ForcedTokens& forced) const {
    at_least("forced.sink_tokens", forced.sink_tokens, 0);
    at_least("forced.recent_pages", forced.recent_pages, 0);
  }

  void candidates(const std::int32_t* pages, const std::int32_t* counts,
                  std::int64_t stride) const {
    pointer("pages", pages);
    pointer("page_counts", counts);
    at_least("candidate_stride", stride, 0);
  }

  void estimate_rows(std::int64_t stride, std::int64_t candidate_stride,
                     const PagedKvView& kv) const {
    require(stride >= candidate_stride * kv.page_size && stride % 16 == 0, op,
            "estimate_stride, got ", stride, ", accepted multiples of 16 from ",
            candidate_stride * kv.page_size);
  }

  void page_stride(std::int64_t stride, const SeqSubset& seqs, const PagedKvView& kv) const {
    std::int64_t pages = 0;
    for (std::int32_t i = 0; i < seqs.count; ++i) {
      pages = std::max<std::int64_t>(pages, kv.host_len(seqs.at(i)) / kv.page_size);
    }
    at_least("page_stride", stride, pages);
  }

  void output(const float* out, std::int64_t stride, const QueryView& q,
              const PagedKvView& kv) const {
    pointer("out", out);
    if (kv.num_seqs > 1) {
      at_least("out_seq_stride", stride, std::int64_t{q.num_heads} * kv.head_dim);
    }
  }
};

}  // namespace twilight

#endif  // TWILIGHT_OPS_FIELD_CHECKS_H_
