#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/label_scores.h"
#include "backend/cpu/select_plan.h"
#include "backend/cpu/unit_stages.h"

namespace twilight::cpu {
namespace {

// Rows between the stages of a slot that the single ops do not have.
struct FusedRows {
  std::int64_t mass_stride = 0;
  float* masses = nullptr;  // [slots, G, mass_stride] log masses, where the caller has no place
  float* dots = nullptr;    // [slots, G, mass_stride, centres] of the means (CentreDots)
  float* norms = nullptr;   // [slots, G]
  float* tile_maxima = nullptr;  // [slots, tiles, G]
  float* maxima = nullptr;       // [slots, G] largest estimates

  struct Sizes {
    std::int64_t slots = 0;
    std::int64_t group = 0;
    std::int64_t mass_pages = 0;  // 0 where scores are not made of masses, or the caller has them
    std::int64_t dot_pages = 0;   // times the means a page; 0 where estimates take no dots
    std::int64_t tiles = 0;
  };
  static FusedRows carve(Arena& arena, const Sizes& sizes) {
    FusedRows rows;
    const std::int64_t heads = sizes.slots * sizes.group;
    rows.mass_stride = padded_row(sizes.mass_pages);
    rows.masses = arena.take<float>("log masses", heads * rows.mass_stride);
    rows.dots = arena.take<float>("dots of means", heads * sizes.dot_pages);
    rows.norms = arena.take<float>("norms", heads);
    rows.tile_maxima = arena.take<float>("maxima of tiles", heads * sizes.tiles);
    rows.maxima = arena.take<float>("maxima", heads);
    return rows;
  }
};

std::int64_t tiles_of(std::int64_t entries, std::int64_t tile) {
  return (entries + tile - 1) / tile;
}

}  // namespace

std::size_t CpuBackend::fused_workspace_bytes(const StepCaps& caps) const {
  Arena arena;
  const SelectSizes sizes = select_sizes(caps, pool_.num_threads());
  SelectPlan::carve(arena, sizes);
  const std::int64_t pages =
      (std::int64_t{caps.max_tokens} + caps.page_size - 1) / std::max(caps.page_size, 1);
  FusedRows::carve(arena, {.slots = sizes.slots,
                           .group = sizes.group,
                           .mass_pages = pages,
                           .dot_pages = padded_row(pages) * kSubCentroids,
                           .tiles = tiles_of(pages, kEstimateTilePages)});
  return arena.used_bytes();
}

void CpuBackend::do_select_and_prune(const SelectAndPruneParams& params, Workspace workspace) {
  const SelectPagesParams& select = params.select;
  const PruneParams& prune = params.prune;
  const bool with_scores = select.mode == SelectMode::kByScore;
  const bool with_estimates = prune.criterion != PruneCriterion::kNone;
  const std::int64_t num_heads = select.kv.num_kv_heads;
  const auto group = static_cast<int>(prune.num_q_heads / num_heads);
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
  sizes.query_bytes = prepared_query_bytes(select.kv.head_dim, group);
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

  // Scores made of masses leave the dots that 2-bit estimates are centred on.
  const int centres = num_centroids(params.score.index.format.summary);
  const bool by_mass = with_scores && centres > 0;
  const bool by_labels = params.score.index.format.summary == SummaryKind::kLabels;
  const bool reads_index = with_estimates && !params.estimate.exact_keys;
  const bool with_dots = by_mass && reads_index && params.estimate.index.format.key_bits == 2;
  const bool masses_given = params.score.log_masses != nullptr;
  const std::int64_t estimate_tiles = whole_units ? 1 : tiles_of(candidates, kEstimateTilePages);
  const FusedRows rows =
      FusedRows::carve(arena, {.slots = sizes.slots,
                               .group = group,
                               .mass_pages = by_mass && !masses_given ? pages : 0,
                               .dot_pages = with_dots ? padded_row(pages) * centres : 0,
                               .tiles = with_estimates ? estimate_tiles : 0});

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
    float* masses;
    std::int64_t mass_stride;
    float* dots;
    float* norms;
    float* tile_maxima;
    float* maxima;
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
    unit.mass_stride = masses_given ? params.score.page_stride : rows.mass_stride;
    unit.masses = masses_given ? params.score.log_masses + unit.row * group * unit.mass_stride
                               : rows.masses + slot * group * unit.mass_stride;
    unit.dots = with_dots ? rows.dots + slot * group * padded_row(pages) * centres : nullptr;
    unit.norms = rows.norms + slot * group;
    unit.tile_maxima = rows.tile_maxima + slot * estimate_tiles * group;
    unit.maxima = rows.maxima + slot * group;
    return unit;
  };
  const auto score_unit = [&](const Unit& unit) {
    return index_unit(params.score, unit.seq, static_cast<std::int32_t>(unit.head));
  };
  const auto estimate_unit = [&](const Unit& unit) {
    return index_unit(params.estimate, unit.seq, static_cast<std::int32_t>(unit.head));
  };
  const auto prepare_scores = [&](const Unit& unit) {
    if (by_labels) {
      prepare_labels(index_, score_unit(unit), unit.score_query);
    } else {
      (by_mass ? index_.prepare_masses : index_.prepare_scores)(score_unit(unit), unit.score_query);
    }
  };
  const auto prepare_estimates = [&](const Unit& unit) {
    if (reads_index) index_.prepare_estimates(estimate_unit(unit), unit.estimate_query);
  };
  const auto score = [&](const Unit& unit, std::int64_t begin, std::int64_t end) {
    end = std::min<std::int64_t>(end, select.kv.sealed_pages(unit.seq));
    if (begin >= end) return;
    if (by_mass) {
      index_.log_masses(score_unit(unit), unit.score_query, begin, end, unit.masses,
                        unit.mass_stride, unit.dots, padded_row(pages));
    } else if (by_labels) {
      score_labels(index_, score_unit(unit), unit.score_query, begin, end, unit.scores);
    } else {
      index_.score_pages(score_unit(unit), unit.score_query, begin, end, unit.scores);
    }
  };
  const auto choose = [&](const Unit& unit, int worker) {
    if (by_mass) {
      index_.combine_masses(unit.masses, unit.mass_stride, group, select.kv.sealed_pages(unit.seq),
                            unit.norms, unit.scores);
    }
    select_unit(select_, select, unit.seq, unit.head, unit.scores, plan.scratch_of(worker));
  };
  const auto estimate = [&](const Unit& unit, std::int64_t begin, std::int64_t end,
                            float* row_max) {
    end = std::min<std::int64_t>(end, select.page_counts[unit.row]);
    index_.estimate(estimate_unit(unit), unit.estimate_query, params.estimate.exact_keys,
                    select.pages + unit.row * select.candidate_stride, begin, std::max(begin, end),
                    {unit.dots, padded_row(pages)}, unit.estimates, unit.estimate_stride, row_max);
  };
  const auto rows_of = [&](const Unit& unit) {
    PruneRows prune_rows;
    prune_rows.estimates = unit.estimates;
    prune_rows.stride = unit.estimate_stride;
    prune_rows.maxima = with_estimates ? unit.maxima : nullptr;
    prune_rows.sets = unit.sets;
    return prune_rows;
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
        estimate(unit, 0, candidates, unit.maxima);
      }
      prune_unit(select_, prune, unit.seq, unit.head, rows_of(unit), plan.scratch_of(worker));
    });
    return;
  }

  // Few units: each phase is shared out in tiles, longest sequences first.
  const auto for_tiles = [&](std::int64_t entries, std::int64_t tile, const auto& body) {
    const std::int64_t tiles = tiles_of(entries, tile);
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
    for_tiles(candidates, kEstimateTilePages,
              [&](const Unit& unit, std::int64_t begin, std::int64_t end) {
                estimate(unit, begin, end, unit.tile_maxima + begin / kEstimateTilePages * group);
              });
    pool_.parallel_for(units * group, [&](std::int64_t i, int worker) {
      const Unit unit = unit_at(i / group, i / group);
      float largest = unit.tile_maxima[i % group];
      for (std::int64_t tile = 1; tile < estimate_tiles; ++tile) {
        largest = std::max(largest, unit.tile_maxima[tile * group + i % group]);
      }
      unit.maxima[i % group] = largest;
      prune_head(select_, prune, unit.seq, unit.head, i % group, rows_of(unit),
                 plan.scratch_of(worker));
    });
  }
  for_units([&](const Unit& unit, int worker) {
    prune_union(select_, prune, unit.seq, unit.head, rows_of(unit), plan.scratch_of(worker));
  });
}

}  // namespace twilight::cpu
