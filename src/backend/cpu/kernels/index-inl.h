#include "backend/cpu/kernels/estimate_pages-inl.h"
#include "backend/cpu/kernels/index.h"
#include "backend/cpu/kernels/page_masses-inl.h"
#include "backend/cpu/kernels/quest-inl.h"
#include "backend/cpu/kernels/seal-inl.h"
#include "backend/cpu/simd.h"

TWILIGHT_BEFORE_NAMESPACE();
namespace twilight::cpu::TWILIGHT_ISA {
namespace {

void exact_scores(const IndexUnit& unit, std::int64_t token_begin, std::int64_t token_end,
                  float* scores, std::int64_t stride) {
  const std::int64_t page_size = unit.kv.page_size;
  const std::int64_t ahead =
      records_ahead(page_size * unit.kv.head_dim * dtype_bytes(unit.kv.dtype));
  const std::int64_t last_page = (token_end - 1) / page_size;
  for (std::int64_t token = token_begin; token < token_end;) {
    const std::int64_t page = token / page_size;
    const std::int64_t slot = token - page * page_size;
    const std::int64_t count = std::min(page_size - slot, token_end - token);
    score_page_rows(unit, unit.kv.page_of(unit.seq, page),
                    unit.kv.page_of(unit.seq, std::min(page + ahead, last_page)), slot, count,
                    scores + token, stride);
    token += count;
  }
}

}  // namespace

const IndexKernels& index_kernels() {
  static constexpr IndexKernels kTable = {
      .prepare_scores = prepare_scores,
      .score_pages = score_pages,
      .prepare_masses = prepare_centres,
      .log_masses = log_masses,
      .combine_masses = combine_masses,
      .prepare_estimates = prepare_estimates,
      .estimate = estimate,
      .exact_scores = exact_scores,
      .convert_row = convert_row,
      .seal_page = seal_page,
  };
  return kTable;
}

}  // namespace twilight::cpu::TWILIGHT_ISA
TWILIGHT_AFTER_NAMESPACE();
