#include "backend/cpu/label_scores.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/buffer.h"

namespace twilight::cpu {
namespace {

constexpr std::int64_t kMaxPages = 1024;
constexpr int kMaxPageTokens = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// The unit on its label channels alone: summaries take the place of estimates.
IndexUnit label_unit(const IndexUnit& unit) {
  IndexUnit out = unit;
  out.kv.head_dim = unit.index.format.label_channels;
  out.index.format = {.summary = SummaryKind::kNone, .key_bits = 4};
  out.index.estimates = unit.index.summaries;
  out.index.estimate_page_stride = unit.index.summary_page_stride;
  out.index.estimate_head_stride = unit.index.summary_head_stride;
  return out;
}

}  // namespace

void prepare_labels(const IndexKernels& kernels, const IndexUnit& unit, std::byte* query) {
  IndexUnit labels = label_unit(unit);
  const std::int64_t channels = labels.kv.head_dim;
  // The query on these channels lies at the end of the memory. In front of it the prepared form
  // takes at most 4 bytes a channel and head and 128 bytes of constants a head.
  const auto bytes = static_cast<std::size_t>(unit.group * channels) * sizeof(float);
  auto* gathered = reinterpret_cast<float*>(
      query + prepared_query_bytes(unit.kv.head_dim, unit.group) - align_up(bytes));
  const std::int32_t* channel = unit.index.head_labels(unit.kv_head);
  for (std::int64_t g = 0; g < unit.group; ++g) {
    for (std::int64_t i = 0; i < channels; ++i) {
      gathered[g * channels + i] = unit.q[g * unit.kv.head_dim + channel[i]];
    }
  }
  labels.q = gathered;
  kernels.prepare_estimates(labels, query);
}

void score_labels(const IndexKernels& kernels, const IndexUnit& unit, const std::byte* query,
                  std::int64_t page_begin, std::int64_t page_end, float* scores) {
  const IndexUnit labels = label_unit(unit);
  const std::int64_t page_size = unit.kv.page_size;
  const std::int64_t at_once = std::min(
      kMaxPages, kLabelScratch / (unit.group * label_row(static_cast<std::int32_t>(page_size))));
  const std::int64_t stride = at_once * label_row(static_cast<std::int32_t>(page_size));
  alignas(kBufferAlignment) float estimates[kLabelScratch];
  float row_max[kLabelScratch / kEstimateTileTokens];  // of the heads: not used
  std::int32_t pages[kMaxPages];
  for (std::int64_t first = page_begin; first < page_end; first += at_once) {
    const std::int64_t count = std::min(at_once, page_end - first);
    for (std::int64_t i = 0; i < count; ++i) pages[i] = static_cast<std::int32_t>(first + i);
    kernels.estimate(labels, query, false, pages, 0, count, {}, estimates, stride, row_max);
    for (std::int64_t i = 0; i < count; ++i) {
      float best = -kInfinity;
      for (std::int64_t g = 0; g < unit.group; ++g) {
        const float* row = estimates + g * stride + i * page_size;
        for (std::int64_t slot = 0; slot < page_size; ++slot) {
          best = row[slot] > best ? row[slot] : best;
        }
      }
      scores[first + i] = best;
    }
  }
}

void seal_labels(const IndexKernels& kernels, const PagedKvView& kv, const KeyIndexView& index,
                 std::int64_t page, std::int64_t kv_head, std::byte* scratch) {
  const std::int64_t channels = index.format.label_channels;
  const auto element = static_cast<std::size_t>(dtype_bytes(kv.dtype));
  alignas(kBufferAlignment) std::byte gathered[kMaxPageTokens * kMaxLabels * sizeof(float)];
  const std::int32_t* channel = index.head_labels(kv_head);
  std::byte* to = gathered;
  for (std::int64_t slot = 0; slot < kv.page_size; ++slot) {
    const std::byte* row =
        kv.k_rows(page, kv_head) + slot * kv.k.token_stride * static_cast<std::int64_t>(element);
    for (std::int64_t i = 0; i < channels; ++i, to += element) {
      std::memcpy(to, row + channel[i] * static_cast<std::int64_t>(element), element);
    }
  }
  PagedKvView small;
  small.dtype = kv.dtype;
  small.num_kv_heads = 1;
  small.head_dim = static_cast<std::int32_t>(channels);
  small.page_size = kv.page_size;
  small.k = {gathered, channels * kv.page_size, channels * kv.page_size, channels};
  KeyIndexView record;
  record.format = {.summary = SummaryKind::kNone, .key_bits = 4};
  record.estimates = index.summary(page, kv_head);
  kernels.seal_page(small, record, 0, 0, scratch);
}

}  // namespace twilight::cpu
