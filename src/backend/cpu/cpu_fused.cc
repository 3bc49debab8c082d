#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/select_plan.h"
#include "backend/cpu/unit_stages.h"

namespace twilight::cpu {

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
  const auto rows_of = [&](const Unit& unit) {
    PruneRows rows;
    rows.estimates = unit.estimates;
    rows.stride = unit.estimate_stride;
    rows.sets = unit.sets;
    return rows;
  };

  if (whole_units) {
    pool_.parallel_for(units, [&](std::int64_t i, int worker) {
      const Unit unit = unit_at(i, worker);
      if (with_scores) {
        prepare_scores(unit);
        score(unit, 0, pages);
      }
      choose(unit, worker);
      if (with_estimates) {
        prepare_estimates(unit);
        estimate(unit, 0, candidates);
      }
      prune_unit(select_, prune, unit.seq, unit.head, rows_of(unit), plan.scratch_of(worker));
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
  if (with_estimates) {
    for_tiles(candidates, kEstimateTilePages, estimate);
    pool_.parallel_for(units * group, [&](std::int64_t i, int worker) {
      const Unit unit = unit_at(i / group, i / group);
      prune_head(select_, prune, unit.seq, unit.head, i % group, rows_of(unit),
                 plan.scratch_of(worker));
    });
  }
  for_units([&](const Unit& unit, int worker) {
    prune_union(select_, prune, unit.seq, unit.head, rows_of(unit), plan.scratch_of(worker));
  });
}

}  // namespace twilight::cpu
