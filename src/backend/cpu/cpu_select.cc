#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/select_plan.h"
#include "backend/cpu/unit_stages.h"
#include "core/check.h"

namespace twilight::cpu {
namespace {

// Forced pages are the first `front` and all from `back` on.
struct ForcedPages {
  std::int64_t front = 0;
  std::int64_t back = 0;
};

ForcedPages forced_pages(const ForcedTokens& forced, std::int64_t n, std::int64_t page_size) {
  const std::int64_t total = (n + page_size - 1) / page_size;
  const std::int64_t sealed = n / page_size;
  const std::int64_t sinks = (forced.sink_tokens + page_size - 1) / page_size;
  const std::int64_t front = std::clamp<std::int64_t>(sinks, 0, total);
  return {front, std::clamp<std::int64_t>(sealed - forced.recent_pages, front, total)};
}

}  // namespace

void select_unit(const SelectKernels& kernels, const SelectPagesParams& params, std::int32_t seq,
                 std::int64_t kv_head, const float* scores, std::int32_t* scratch) {
  const std::int64_t n = params.kv.seq_lens[seq];
  const std::int64_t total = params.kv.total_pages(seq);
  const std::int64_t row = std::int64_t{seq} * params.kv.num_kv_heads + kv_head;
  std::int32_t* out = params.pages + row * params.candidate_stride;
  std::int64_t count = 0;
  const auto put_range = [&](std::int64_t begin, std::int64_t end) {
    require(count + end - begin <= params.candidate_stride, "select",
            "more candidate pages than candidate_stride, got ", count + end - begin,
            ", accepted at most ", params.candidate_stride);
    for (std::int64_t page = begin; page < end; ++page) {
      out[count++] = static_cast<std::int32_t>(page);
    }
  };
  if (params.mode == SelectMode::kAll) {
    put_range(0, total);
  } else {
    const ForcedPages forced = forced_pages(params.forced, n, params.kv.page_size);
    put_range(0, forced.front);
    if (params.mode == SelectMode::kByScore) {
      const std::int64_t num_forced = forced.front + total - forced.back;
      std::int64_t wanted = std::clamp<std::int64_t>(params.budget_pages(n) - num_forced, 0,
                                                     forced.back - forced.front);
      if (params.mass > 0 && wanted > 0) {
        const std::int64_t page_size = params.kv.page_size;
        const std::int64_t floor = (params.mass_floor + page_size - 1) / page_size - num_forced;
        if (floor < wanted) {
          const std::int64_t sealed = n / page_size;
          const std::int64_t enough = kernels.count_by_mass(
              {scores, sealed, forced.front, std::min(forced.back, sealed), params.mass}, scratch);
          wanted = std::min(wanted, std::max(floor, enough));
        }
      }
      require(num_forced + wanted <= params.candidate_stride, "select",
              "more candidate pages than candidate_stride, got ", num_forced + wanted,
              ", accepted at most ", params.candidate_stride);
      count += kernels.select_top(scores, forced.front, forced.back, wanted, out + count,
                                  params.candidate_stride - count, scratch);
    }
    put_range(forced.back, total);
  }
  params.page_counts[row] = static_cast<std::int32_t>(count);
}

std::size_t CpuBackend::select_workspace_bytes(const StepCaps& caps) const {
  Arena counter;
  SelectPlan::carve(counter, select_sizes(caps, pool_.num_threads()));
  return counter.used_bytes();
}

void CpuBackend::do_select_pages(const SelectPagesParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  SelectPlan plan = SelectPlan::carve(
      arena, {.seqs = params.seqs.count,
              .threads = pool_.num_threads(),
              .scratch = select_scratch_entries(longest_in_pages(params.seqs, params.kv))});
  plan.order_longest_first(params.seqs, params.kv);
  const std::int64_t num_heads = params.kv.num_kv_heads;
  pool_.parallel_for(params.seqs.count * num_heads, [&](std::int64_t unit, int worker) {
    const std::int32_t seq = plan.order[unit / num_heads];
    const std::int64_t head = unit % num_heads;
    const float* scores = params.scores == nullptr
                              ? nullptr
                              : params.scores + (seq * num_heads + head) * params.page_stride;
    select_unit(select_, params, seq, head, scores, plan.scratch_of(worker));
  });
}

}  // namespace twilight::cpu
