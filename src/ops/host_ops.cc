#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/backend.h"

// Small ops on host memory, the same for every backend that works there.
namespace twilight {

void Backend::do_embed(const EmbedParams& params) {
  const WeightView& table = params.table;
  const std::int64_t row_bytes = table.row_bytes();
  for (std::int64_t t = 0; t < params.num_tokens; ++t) {
    dequantise_row(table.type(), table.data + params.tokens[t] * row_bytes,
                   {params.out + t * table.cols, static_cast<std::size_t>(table.cols)});
  }
}

void Backend::do_rotation(const RotationParams& params) {
  for (std::int64_t t = 0; t < params.num_tokens; ++t) {
    for (std::int64_t i = 0; i < params.half; ++i) {
      const double angle = params.positions[t] * params.frequencies[i];
      params.cos[t * params.half + i] = static_cast<float>(std::cos(angle));
      params.sin[t * params.half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void Backend::do_argmax(const ArgmaxParams& params) {
  for (std::int64_t row = 0; row < params.num_rows; ++row) {
    const float* const x = params.x + row * params.cols;
    std::int64_t best = 0;
    bool ordered = true;
    for (std::int64_t i = 0; i < params.cols; ++i) {
      ordered = ordered && !std::isnan(x[i]);
      if (x[i] > x[best]) best = i;
    }
    params.out[row] = ordered && std::isfinite(x[best]) ? static_cast<std::int32_t>(best) : -1;
  }
}

void Backend::do_sample_rows(const SampleRowsParams& params) {
  for (std::int64_t row = 0; row < params.num_rows; ++row) {
    params.out[row] =
        sample_row({params.x + row * params.cols, static_cast<std::size_t>(params.cols)},
                   params.draws[row], sample_order_);
  }
}

void Backend::do_count_tail(const CountTailParams& params, Workspace /*workspace*/) {
  const PagedKvView& kv = params.kv;
  const TailParams& tail = params.tail;
  const std::int64_t group = params.num_q_heads / kv.num_kv_heads;
  for (std::int32_t s = 0; s < params.seqs.count; ++s) {
    const std::int64_t seq = params.seqs.at(s);
    const std::int32_t sealed = kv.sealed_pages(seq);
    for (std::int64_t unit = seq * kv.num_kv_heads; unit < (seq + 1) * kv.num_kv_heads; ++unit) {
      const std::int32_t* page = tail.pages + unit * tail.candidate_stride;
      const std::int32_t* const end = page + tail.page_counts[unit];
      std::int32_t count = 0;
      for (std::int64_t i = 0; i < tail.page_counts[unit]; ++i) {
        bool any = false;
        for (std::int64_t head = unit * group; head < (unit + 1) * group; ++head) {
          any = any || tail.mass[head * tail.candidate_stride + i] > 0;
        }
        count += any ? 1 : 0;
      }
      if (tail.log_masses != nullptr) {
        const float lowest = tail.lowest_far_score(sealed);
        const float* const scores = tail.scores + unit * tail.page_stride;
        for (std::int32_t i = 0; i < sealed; ++i) {
          if (page != end && *page == i) {
            ++page;
          } else if (scores[i] >= lowest) {
            ++count;
          }
        }
      }
      params.counts[unit] = count;
    }
  }
}

}  // namespace twilight
