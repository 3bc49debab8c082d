#include "core/check.h"
#include "sparse/decode_step_scratch.h"

// What a step's statistics say, from the lists that it left.
namespace twilight {

void DecodeStep::read_stats(const DecodeStepParams& params, std::byte* host_lists,
                            std::span<LayerStats> stats) const {
  const Scratch lists = carve(host_lists, nullptr, 0);
  for (std::size_t seq = 0; seq < stats.size(); ++seq) {
    const auto at = static_cast<std::int32_t>(seq);
    const float p = params.p != nullptr ? params.p[seq] : policy_.p_of_layer(params.layer);
    const StepPath path = path_of(params.layer, params.kv.host_len(at), p);
    TWILIGHT_DCHECK(host_lists != nullptr || is_dense(path));
    fill_stats(params, lists, at, path, stats[seq]);
    stats[seq].true_mass.clear();
  }
}

void DecodeStep::fill_stats(const DecodeStepParams& params, const Scratch& s, std::int32_t seq,
                            StepPath path, LayerStats& stats) const {
  const std::int64_t num_kv_heads = caps_.num_kv_heads;
  const std::int64_t num_q_heads = caps_.num_q_heads;
  const std::int32_t n = params.kv.host_len(seq);
  const std::int64_t row_bytes = std::int64_t{caps_.head_dim} * dtype_bytes(params.kv.dtype);
  stats.path = path;
  stats.num_tokens = n;
  stats.bytes_dense = 2 * row_bytes * n * num_kv_heads;
  stats.candidates.assign(static_cast<std::size_t>(num_kv_heads), n);
  stats.attended.assign(static_cast<std::size_t>(num_kv_heads), n);
  stats.kept.assign(static_cast<std::size_t>(num_q_heads), n);
  stats.estimated_mass.assign(static_cast<std::size_t>(num_q_heads), 1.0F);
  stats.bytes_read = stats.bytes_dense;
  if (is_dense(path)) return;

  const std::int32_t page_size = caps_.page_size;
  const std::int32_t sealed = n / page_size;
  const std::int32_t open_tokens = n % page_size;
  // PageParams count once: with the summaries where those are scored and need them, with 2-bit
  // records otherwise, and else with the value means.
  const bool scored_params =
      selector_->mode() == SelectMode::kByScore && num_centroids(selector_->summary()) > 0;
  const bool estimate_params = !scored_params && policy_.key_bits == 2;
  constexpr auto kParamsBytes = static_cast<std::int64_t>(sizeof(PageParams));
  const std::int64_t tail_bytes =
      nibble_bytes(caps_.head_dim) + (scored_params || estimate_params ? 0 : kParamsBytes);
  const std::int64_t record_bytes =
      policy_.key_bits == 16
          ? page_size * row_bytes
          : estimate_record_bytes(params.index.format, page_size, caps_.head_dim);
  stats.bytes_read = 0;
  if (selector_->mode() == SelectMode::kByScore) {
    stats.bytes_read += num_kv_heads * sealed * selector_->bytes_per_page(params.kv);
  }
  for (std::int64_t head = 0; head < num_kv_heads; ++head) {
    const std::int64_t unit = seq * num_kv_heads + head;
    const std::int32_t count = s.page_counts[unit];
    const bool has_open = open_tokens > 0;  // the open page is forced, so always a candidate
    const std::int64_t sealed_candidates = count - (has_open ? 1 : 0);
    const auto h = static_cast<std::size_t>(head);
    stats.candidates[h] = static_cast<std::int32_t>(sealed_candidates * page_size + open_tokens);
    stats.attended[h] = s.kept_counts[unit];
    if (policy_.prune) {
      stats.bytes_read +=
          sealed_candidates * (record_bytes + (estimate_params ? kParamsBytes : 0)) +
          open_tokens * row_bytes;
      if (s.tail_counts != nullptr) stats.bytes_read += s.tail_counts[unit] * tail_bytes;
    }
    stats.bytes_read += 2 * row_bytes * s.kept_counts[unit];
  }
  for (std::int64_t head = 0; head < num_q_heads; ++head) {
    stats.kept[static_cast<std::size_t>(head)] = s.head_counts[seq * num_q_heads + head];
    stats.estimated_mass[static_cast<std::size_t>(head)] = s.head_mass[seq * num_q_heads + head];
  }
}

std::string_view step_path_name(StepPath path) {
  switch (path) {
    case StepPath::kSparse:
      return "sparse";
    case StepPath::kDensePolicy:
      return "policy";
    case StepPath::kDenseLayer:
      return "dense layer";
    case StepPath::kDenseShort:
      return "short";
    case StepPath::kDenseAllForced:
      return "all forced";
    case StepPath::kDenseFullMass:
      return "p = 1";
  }
  return "unknown";
}

}  // namespace twilight
