#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/select_plan.h"
#include "backend/cpu/unit_stages.h"

namespace twilight::cpu {
namespace {

// Every candidate token, for PruneCriterion::kNone.
void keep_all(const PruneParams& params, std::int32_t seq, std::int64_t kv_head) {
  const std::int64_t page_size = params.kv.page_size;
  const std::int64_t n = params.kv.seq_lens[seq];
  const std::int64_t row = std::int64_t{seq} * params.kv.num_kv_heads + kv_head;
  const std::int32_t* pages = params.pages + row * params.candidate_stride;
  std::int32_t* kept = params.kept + row * params.kept_stride;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < params.page_counts[row]; ++i) {
    const std::int64_t begin = pages[i] * page_size;
    const std::int64_t end = std::min(begin + page_size, n);
    for (std::int64_t token = begin; token < end; ++token) {
      kept[count++] = static_cast<std::int32_t>(token);
    }
  }
  params.kept_counts[row] = static_cast<std::int32_t>(count);
  const std::int32_t group = params.num_q_heads / params.kv.num_kv_heads;
  for (std::int64_t head = row * group; head < (row + 1) * group; ++head) {
    params.head_counts[head] = static_cast<std::int32_t>(count);
    params.head_mass[head] = 1.0F;
  }
}

}  // namespace

void prune_head(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                std::int64_t kv_head, std::int64_t g, const PruneRows& rows,
                std::int32_t* scratch) {
  if (params.criterion == PruneCriterion::kNone) return;
  const std::int64_t row = std::int64_t{seq} * params.kv.num_kv_heads + kv_head;
  const std::int32_t group = params.num_q_heads / params.kv.num_kv_heads;
  const std::int64_t slots = std::int64_t{params.page_counts[row]} * params.kv.page_size;
  float* estimates = rows.estimates + g * rows.stride;
  const float* maximum = rows.maxima == nullptr || slots == 0 ? nullptr : rows.maxima + g;
  if (params.criterion == PruneCriterion::kGroupMean) {
    kernels.weigh_head(estimates, slots, maximum, rows.sets + g);
  } else {
    kernels.find_head_set(estimates, slots, maximum, params.p[row * group + g], params.min_tokens,
                          scratch, rows.sets + g);
  }
}

void prune_union(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                 std::int64_t kv_head, const PruneRows& rows, std::int32_t* scratch) {
  if (params.criterion == PruneCriterion::kNone) {
    keep_all(params, seq, kv_head);
    return;
  }
  const std::int64_t row = std::int64_t{seq} * params.kv.num_kv_heads + kv_head;
  UnitePart part;
  part.criterion = params.criterion;
  part.min_tokens = params.min_tokens;
  part.weights = rows.estimates;
  part.stride = rows.stride;
  part.heads = rows.sets;
  part.pages = params.pages + row * params.candidate_stride;
  part.page_count = params.page_counts[row];
  part.group = params.num_q_heads / params.kv.num_kv_heads;
  part.page_size = params.kv.page_size;
  part.num_tokens = params.kv.seq_lens[seq];
  part.forced = params.forced;
  part.kept = params.kept + row * params.kept_stride;
  part.kept_capacity = params.kept_stride;
  part.head_counts = params.head_counts + row * part.group;
  part.head_mass = params.head_mass + row * part.group;
  const float* p = params.p + row * part.group;
  part.p = *std::max_element(p, p + part.group);
  if (params.tail_mass != nullptr) {
    part.tail_mass = params.tail_mass + row * part.group * params.candidate_stride;
    part.tail_stride = params.candidate_stride;
    part.tail_shift = params.tail_shift + row * part.group;
  }
  params.kept_counts[row] = static_cast<std::int32_t>(kernels.unite_heads(part, scratch));
}

void prune_unit(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                std::int64_t kv_head, const PruneRows& rows, std::int32_t* scratch) {
  const std::int32_t group = params.num_q_heads / params.kv.num_kv_heads;
  for (std::int64_t g = 0; g < group; ++g) {
    prune_head(kernels, params, seq, kv_head, g, rows, scratch);
  }
  prune_union(kernels, params, seq, kv_head, rows, scratch);
}

void CpuBackend::do_prune_top_p(const PruneParams& params, Workspace workspace) {
  const std::int64_t num_heads = params.kv.num_kv_heads;
  const std::int64_t group = params.num_q_heads / num_heads;
  const std::int64_t units = params.seqs.count * num_heads;
  const std::int64_t candidates =
      std::min(params.candidate_stride, longest_in_pages(params.seqs, params.kv));
  Arena arena(workspace.data, workspace.bytes);
  SelectPlan plan = SelectPlan::carve(
      arena, {.seqs = params.seqs.count,
              .units = units,
              .group = group,
              .threads = pool_.num_threads(),
              .scratch = prune_scratch_entries(candidates * params.kv.page_size)});
  plan.order_longest_first(params.seqs, params.kv);
  const auto seq_of = [&](std::int64_t unit) { return plan.order[unit / num_heads]; };
  const auto rows_of = [&](std::int64_t unit) {
    PruneRows rows;
    if (params.estimates != nullptr) {
      const std::int64_t row = seq_of(unit) * num_heads + unit % num_heads;
      rows.estimates = params.estimates + row * group * params.estimate_stride;
    }
    rows.stride = params.estimate_stride;
    rows.sets = plan.sets + unit * group;
    return rows;
  };
  if (params.criterion == PruneCriterion::kNone || units >= kUnitsPerThread * pool_.num_threads()) {
    pool_.parallel_for(units, [&](std::int64_t unit, int worker) {
      prune_unit(select_, params, seq_of(unit), unit % num_heads, rows_of(unit),
                 plan.scratch_of(worker));
    });
    return;
  }
  pool_.parallel_for(units * group, [&](std::int64_t i, int worker) {
    const std::int64_t unit = i / group;
    prune_head(select_, params, seq_of(unit), unit % num_heads, i % group, rows_of(unit),
               plan.scratch_of(worker));
  });
  pool_.parallel_for(units, [&](std::int64_t unit, int worker) {
    prune_union(select_, params, seq_of(unit), unit % num_heads, rows_of(unit),
                plan.scratch_of(worker));
  });
}

}  // namespace twilight::cpu
