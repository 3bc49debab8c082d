#include <algorithm>
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/select_plan.h"
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

// The candidate list of one unit. `scores` is its row, read only for kByScore.
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
      const std::int64_t wanted = std::clamp<std::int64_t>(params.budget_pages(n) - num_forced, 0,
                                                           forced.back - forced.front);
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

// `estimates` and `sets` are those of the unit's first head.
void find_head(const SelectKernels& kernels, const PruneParams& params, std::int64_t row,
               std::int64_t g, float* estimates, std::int64_t stride, HeadSet* sets,
               std::int32_t* scratch) {
  const std::int32_t group = params.num_q_heads / params.kv.num_kv_heads;
  kernels.find_head_set(estimates + g * stride,
                        std::int64_t{params.page_counts[row]} * params.kv.page_size,
                        params.p[row * group + g], params.min_tokens, scratch, sets + g);
}

void unite_unit(const SelectKernels& kernels, const PruneParams& params, std::int32_t seq,
                std::int64_t kv_head, const float* estimates, std::int64_t stride,
                const HeadSet* sets, std::int32_t* scratch) {
  const std::int64_t row = std::int64_t{seq} * params.kv.num_kv_heads + kv_head;
  UnitePart part;
  part.weights = estimates;
  part.stride = stride;
  part.heads = sets;
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
  params.kept_counts[row] = static_cast<std::int32_t>(kernels.unite_heads(part, scratch));
}

float* estimates_of(const PruneParams& params, std::int64_t row) {
  const std::int64_t group = params.num_q_heads / params.kv.num_kv_heads;
  return params.estimates + row * group * params.estimate_stride;
}

}  // namespace

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
  const auto row_of = [&](std::int64_t unit) {
    return seq_of(unit) * num_heads + unit % num_heads;
  };
  const auto find = [&](std::int64_t unit, std::int64_t g, int worker) {
    find_head(select_, params, row_of(unit), g, estimates_of(params, row_of(unit)),
              params.estimate_stride, plan.sets + unit * group, plan.scratch_of(worker));
  };
  const auto unite = [&](std::int64_t unit, int worker) {
    unite_unit(select_, params, seq_of(unit), unit % num_heads, estimates_of(params, row_of(unit)),
               params.estimate_stride, plan.sets + unit * group, plan.scratch_of(worker));
  };
  if (params.criterion == PruneCriterion::kNone) {
    pool_.parallel_for(
        units, [&](std::int64_t unit, int) { keep_all(params, seq_of(unit), unit % num_heads); });
  } else if (units >= kUnitsPerThread * pool_.num_threads()) {
    pool_.parallel_for(units, [&](std::int64_t unit, int worker) {
      for (std::int64_t g = 0; g < group; ++g) find(unit, g, worker);
      unite(unit, worker);
    });
  } else {
    pool_.parallel_for(units * group,
                       [&](std::int64_t i, int worker) { find(i / group, i % group, worker); });
    pool_.parallel_for(units, unite);
  }
}

void CpuBackend::do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  const SelectPagesParams& select = params.select;
  const PruneParams& prune = params.prune;
  const bool with_scores = select.mode == SelectMode::kByScore;
  const bool with_estimates = prune.criterion != PruneCriterion::kNone;
  const std::int64_t num_heads = select.kv.num_kv_heads;
  const std::int64_t group = prune.num_q_heads / num_heads;
  const std::int64_t page_size = select.kv.page_size;
  const std::int64_t units = select.seqs.count * num_heads;
  const int threads = pool_.num_threads();
  const std::int64_t pages = longest_in_pages(select.seqs, select.kv);
  const std::int64_t candidates = std::min(select.candidate_stride, pages);
  const bool whole_units = units >= kUnitsPerThread * threads;

  // Slots of intermediate rows: one a worker, or one a unit.
  SelectSizes sizes;
  sizes.seqs = select.seqs.count;
  sizes.units = units;
  sizes.group = group;
  sizes.threads = threads;
  sizes.slots = whole_units ? threads : units;
  sizes.query_bytes = prepared_query_bytes(select.kv.head_dim, static_cast<int>(group));
  if (with_scores) {
    sizes.scratch = select_scratch_entries(pages);
    if (params.score.scores == nullptr) sizes.scores = padded_row(pages);
  }
  if (with_estimates) {
    sizes.scratch = std::max(sizes.scratch, prune_scratch_entries(candidates * page_size));
    if (params.estimate.estimates == nullptr) sizes.estimates = padded_row(candidates * page_size);
  }
  Arena arena(workspace.data, workspace.bytes);
  SelectPlan plan = SelectPlan::carve(arena, sizes);
  plan.order_longest_first(select.seqs, select.kv);

  struct Unit {
    std::int32_t seq;
    std::int64_t head;
    std::int64_t row;
    float* scores;
    float* estimates;
    std::int64_t estimate_stride;
    std::byte* score_query;
    std::byte* estimate_query;
    HeadSet* sets;
  };
  const auto unit_at = [&](std::int64_t i, std::int64_t slot) {
    Unit unit{};
    unit.seq = plan.order[i / num_heads];
    unit.head = i % num_heads;
    unit.row = unit.seq * num_heads + unit.head;
    unit.scores = params.score.scores != nullptr
                      ? params.score.scores + unit.row * params.score.page_stride
                      : plan.scores + slot * sizes.scores;
    unit.estimate_stride =
        params.estimate.estimates != nullptr ? params.estimate.estimate_stride : sizes.estimates;
    unit.estimates = params.estimate.estimates != nullptr
                         ? params.estimate.estimates + unit.row * group * unit.estimate_stride
                         : plan.estimates + slot * group * sizes.estimates;
    unit.score_query = plan.queries + 2 * slot * sizes.query_bytes;
    unit.estimate_query = unit.score_query + sizes.query_bytes;
    unit.sets = plan.sets + i * group;
    return unit;
  };
  const auto prepare_scores = [&](const Unit& unit) {
    index_.prepare_scores(index_unit(params.score, unit.seq, static_cast<std::int32_t>(unit.head)),
                          unit.score_query);
  };
  const bool reads_index = !params.estimate.exact_keys;
  const auto prepare_estimates = [&](const Unit& unit) {
    if (!reads_index) return;
    index_.prepare_estimates(
        index_unit(params.estimate, unit.seq, static_cast<std::int32_t>(unit.head)),
        unit.estimate_query);
  };
  const auto score = [&](const Unit& unit, std::int64_t begin, std::int64_t end) {
    end = std::min<std::int64_t>(end, select.kv.sealed_pages(unit.seq));
    if (begin >= end) return;
    index_.score_pages(index_unit(params.score, unit.seq, static_cast<std::int32_t>(unit.head)),
                       unit.score_query, begin, end, unit.scores);
  };
  const auto choose = [&](const Unit& unit, int worker) {
    select_unit(select_, select, unit.seq, unit.head, unit.scores, plan.scratch_of(worker));
  };
  const auto estimate = [&](const Unit& unit, std::int64_t begin, std::int64_t end) {
    end = std::min<std::int64_t>(end, select.page_counts[unit.row]);
    if (begin >= end) return;
    index_.estimate(index_unit(params.estimate, unit.seq, static_cast<std::int32_t>(unit.head)),
                    unit.estimate_query, params.estimate.exact_keys,
                    select.pages + unit.row * select.candidate_stride, begin, end, unit.estimates,
                    unit.estimate_stride);
  };
  const auto find = [&](const Unit& unit, std::int64_t g, int worker) {
    find_head(select_, prune, unit.row, g, unit.estimates, unit.estimate_stride, unit.sets,
              plan.scratch_of(worker));
  };
  const auto unite = [&](const Unit& unit, int worker) {
    unite_unit(select_, prune, unit.seq, unit.head, unit.estimates, unit.estimate_stride, unit.sets,
               plan.scratch_of(worker));
  };

  if (whole_units) {
    pool_.parallel_for(units, [&](std::int64_t i, int worker) {
      const Unit unit = unit_at(i, worker);
      if (with_scores) {
        prepare_scores(unit);
        score(unit, 0, pages);
      }
      choose(unit, worker);
      if (!with_estimates) {
        keep_all(prune, unit.seq, unit.head);
        return;
      }
      prepare_estimates(unit);
      estimate(unit, 0, candidates);
      for (std::int64_t g = 0; g < group; ++g) find(unit, g, worker);
      unite(unit, worker);
    });
    return;
  }

  // Few units: each phase is shared out in tiles, longest sequences first.
  const auto for_tiles = [&](std::int64_t entries, std::int64_t tile, const auto& body) {
    const std::int64_t tiles = (entries + tile - 1) / tile;
    pool_.parallel_for(units * tiles, [&](std::int64_t i, int) {
      const std::int64_t begin = i % tiles * tile;
      body(unit_at(i / tiles, i / tiles), begin, begin + tile);
    });
  };
  const auto for_units = [&](const auto& body) {
    pool_.parallel_for(units, [&](std::int64_t i, int worker) { body(unit_at(i, i), worker); });
  };
  if (with_scores || with_estimates) {
    for_units([&](const Unit& unit, int) {
      if (with_scores) prepare_scores(unit);
      if (with_estimates) prepare_estimates(unit);
    });
  }
  if (with_scores) for_tiles(pages, kScoreTilePages, score);
  for_units(choose);
  if (!with_estimates) {
    for_units([&](const Unit& unit, int) { keep_all(prune, unit.seq, unit.head); });
    return;
  }
  for_tiles(candidates, kEstimateTilePages, estimate);
  pool_.parallel_for(units * group, [&](std::int64_t i, int worker) {
    find(unit_at(i / group, i / group), i % group, worker);
  });
  for_units(unite);
}

}  // namespace twilight::cpu
