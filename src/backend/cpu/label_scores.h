#ifndef TWILIGHT_BACKEND_CPU_LABEL_SCORES_H_
#define TWILIGHT_BACKEND_CPU_LABEL_SCORES_H_

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/index.h"

/// Page scores of kLabels summaries. A record is a 4-bit estimate record of few channels, so the
/// kernels of estimates read it, given the unit as it looks on the label channels.
namespace twilight::cpu {

/// Floats of stack that hold the estimates of some pages, [G, pages * P].
inline constexpr std::int64_t kLabelScratch = 16384;

/// Floats a page takes in a row of estimates; the kernels read and write whole vectors.
[[nodiscard]] constexpr std::int64_t label_row(std::int32_t page_size) {
  return (std::int64_t{page_size} + 15) / 16 * 16;
}

/// Writes what `score_labels` reads; `query` has prepared_query_bytes of the whole head.
void prepare_labels(const IndexKernels& kernels, const IndexUnit& unit, std::byte* query);

/// Scores of the sealed pages [page_begin, page_end) into scores[page]: the largest estimate of
/// each page, NaN passed over. Values do not depend on the range. G * label_row(P) is at most
/// kLabelScratch.
void score_labels(const IndexKernels& kernels, const IndexUnit& unit, const std::byte* query,
                  std::int64_t page_begin, std::int64_t page_end, float* scores);

/// Writes the record of one (physical page, KV head). `scratch` has seal_scratch_bytes of the whole
/// head.
void seal_labels(const IndexKernels& kernels, const PagedKvView& kv, const KeyIndexView& index,
                 std::int64_t page, std::int64_t kv_head, std::byte* scratch);

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_LABEL_SCORES_H_
