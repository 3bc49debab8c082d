#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels/select.h"
#include "backend/cpu/label_scores.h"

namespace twilight::cpu {
namespace {

// Tokens of one task, in whole pages: some 100 KiB of index records, a few microseconds.
constexpr std::int64_t kScoreTaskTokens = 4096;
constexpr std::int64_t kEstimateTaskTokens = 1024;
constexpr std::int64_t kExactTaskTokens = 512;

std::int64_t tile_pages(std::int64_t tokens, std::int32_t page_size) {
  return std::max<std::int64_t>(1, tokens / page_size);
}

// A worker's prepared query and the unit it belongs to. Tasks come in ascending order, so a worker
// prepares a unit's query once.
struct alignas(kBufferAlignment) WorkerQuery {
  std::int64_t unit = -1;
};

struct TileScratch {
  std::int64_t* first_tile = nullptr;  // [units + 1] unit u owns tiles [first[u], first[u + 1])
  std::byte* queries = nullptr;        // per worker: WorkerQuery, then the prepared query
  std::size_t worker_bytes = 0;
  float* heads = nullptr;  // per worker: one number a head
  std::int64_t head_stride = 0;

  TileScratch(Arena& arena, std::int64_t units, int head_dim, int group, int workers)
      : first_tile(arena.take<std::int64_t>("first_tile", units + 1)),
        worker_bytes(sizeof(WorkerQuery) + prepared_query_bytes(head_dim, group)),
        head_stride(padded_row(group)) {
    queries = arena.take<std::byte>("queries", static_cast<std::int64_t>(worker_bytes) * workers);
    heads = arena.take<float>("heads", head_stride * workers);
  }
  [[nodiscard]] WorkerQuery* worker(int index) const {
    return reinterpret_cast<WorkerQuery*>(queries + worker_bytes * static_cast<std::size_t>(index));
  }
  [[nodiscard]] float* worker_heads(int index) const { return heads + head_stride * index; }
};

// Log masses of every unit, [units, G, stride], where a caller has no place for them, and what each
// worker needs to combine them.
struct MassScratch {
  float* masses = nullptr;
  std::int64_t stride = 0;
  float* norms = nullptr;
  std::int64_t norm_stride = 0;

  MassScratch(Arena& arena, std::int64_t units, int group, std::int64_t pages, int workers)
      : stride(padded_row(pages)), norm_stride(padded_row(group)) {
    masses = arena.take<float>("log masses", units * group * stride);
    norms = arena.take<float>("norms", norm_stride * workers);
  }
};

// Cuts length(seq, head) items of every unit into tiles and runs them: prepare(unit, query) where a
// worker turns to another unit, run(unit, query, begin, end, scratch [G]) for each tile.
template <typename Params, typename Length, typename Prepare, typename Run>
void for_each_tile(ThreadPool& pool, const Params& params, Arena& arena, std::int64_t tile,
                   const Length& length, const Prepare& prepare, const Run& run) {
  const std::int32_t heads = params.kv.num_kv_heads;
  const std::int64_t units = std::int64_t{params.seqs.count} * heads;
  const TileScratch scratch(arena, units, params.kv.head_dim, params.q.num_heads / heads,
                            pool.num_threads());
  const auto seq_of = [&](std::int64_t unit) { return params.seqs.at(unit / heads); };
  const auto head_of = [&](std::int64_t unit) { return static_cast<std::int32_t>(unit % heads); };
  std::int64_t* first = scratch.first_tile;
  first[0] = 0;
  for (std::int64_t unit = 0; unit < units; ++unit) {
    first[unit + 1] = first[unit] + (length(seq_of(unit), head_of(unit)) + tile - 1) / tile;
  }
  for (int worker = 0; worker < pool.num_threads(); ++worker) *scratch.worker(worker) = {};
  pool.parallel_for(first[units], [&](std::int64_t index, int worker) {
    const std::int64_t unit = std::upper_bound(first, first + units + 1, index) - first - 1;
    const std::int32_t seq = seq_of(unit);
    const std::int32_t head = head_of(unit);
    const std::int64_t begin = (index - first[unit]) * tile;
    const std::int64_t end = std::min<std::int64_t>(begin + tile, length(seq, head));
    WorkerQuery* held = scratch.worker(worker);
    auto* query = reinterpret_cast<std::byte*>(held + 1);
    const IndexUnit work = index_unit(params, seq, head);
    if (held->unit != unit) {
      prepare(work, query);
      held->unit = unit;
    }
    run(work, query, begin, end, scratch.worker_heads(worker));
  });
}

}  // namespace

std::size_t CpuBackend::index_workspace_bytes(const StepCaps& caps) const {
  Arena arena;
  const TileScratch scratch(arena, std::int64_t{caps.max_seqs} * caps.num_kv_heads, caps.head_dim,
                            caps.num_q_heads / caps.num_kv_heads, pool_.num_threads());
  const MassScratch masses(
      arena, std::int64_t{caps.max_seqs} * caps.num_kv_heads, caps.num_q_heads / caps.num_kv_heads,
      (std::int64_t{caps.max_tokens} + caps.page_size - 1) / caps.page_size, pool_.num_threads());
  return arena.used_bytes();
}

void CpuBackend::score_by_mass(const ScorePagesParams& params, Arena& arena) {
  const std::int64_t heads = params.kv.num_kv_heads;
  const std::int64_t units = params.seqs.count * heads;
  const int group = static_cast<int>(params.q.num_heads / heads);
  std::int64_t longest = 0;
  for (std::int32_t i = 0; i < params.seqs.count; ++i) {
    longest = std::max<std::int64_t>(longest, params.kv.sealed_pages(params.seqs.at(i)));
  }
  const bool given = params.log_masses != nullptr;
  const MassScratch scratch(arena, given ? 0 : params.kv.num_seqs * heads, group, longest,
                            pool_.num_threads());
  float* masses = given ? params.log_masses : scratch.masses;
  const std::int64_t stride = given ? params.page_stride : scratch.stride;
  const auto row_of = [&](std::int64_t seq, std::int64_t head) { return seq * heads + head; };
  for_each_tile(
      pool_, params, arena, tile_pages(kScoreTaskTokens, params.kv.page_size),
      [&](std::int32_t seq, std::int32_t) { return params.kv.sealed_pages(seq); },
      index_.prepare_masses,
      [&](const IndexUnit& unit, const std::byte* query, std::int64_t begin, std::int64_t end,
          float*) {
        index_.log_masses(unit, query, begin, end,
                          masses + row_of(unit.seq, unit.kv_head) * group * stride, stride, nullptr,
                          0);
      });
  pool_.parallel_for(units, [&](std::int64_t unit, int worker) {
    const std::int32_t seq = params.seqs.at(unit / heads);
    const std::int64_t row = row_of(seq, unit % heads);
    index_.combine_masses(masses + row * group * stride, stride, group, params.kv.sealed_pages(seq),
                          scratch.norms + worker * scratch.norm_stride,
                          params.scores + row * params.page_stride);
  });
}

void CpuBackend::do_score_pages(const ScorePagesParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  if (num_centroids(params.index.format.summary) > 0) {
    score_by_mass(params, arena);
    return;
  }
  const bool labels = params.index.format.summary == SummaryKind::kLabels;
  for_each_tile(
      pool_, params, arena, tile_pages(kScoreTaskTokens, params.kv.page_size),
      [&](std::int32_t seq, std::int32_t) { return params.kv.sealed_pages(seq); },
      [&](const IndexUnit& unit, std::byte* query) {
        if (labels) {
          prepare_labels(index_, unit, query);
        } else {
          index_.prepare_scores(unit, query);
        }
      },
      [&](const IndexUnit& unit, const std::byte* query, std::int64_t begin, std::int64_t end,
          float*) {
        const std::int64_t row = std::int64_t{unit.seq} * params.kv.num_kv_heads + unit.kv_head;
        float* scores = params.scores + row * params.page_stride;
        if (labels) {
          score_labels(index_, unit, query, begin, end, scores);
        } else {
          index_.score_pages(unit, query, begin, end, scores);
        }
      });
}

void CpuBackend::do_exact_scores(const ExactScoresParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  const std::int64_t tile = tile_pages(kExactTaskTokens, params.kv.page_size) * params.kv.page_size;
  for_each_tile(
      pool_, params, arena, tile,
      [&](std::int32_t seq, std::int32_t) { return params.kv.seq_lens[seq]; },
      [](const IndexUnit&, std::byte*) {},
      [&](const IndexUnit& unit, const std::byte*, std::int64_t begin, std::int64_t end, float*) {
        const std::int64_t row =
            std::int64_t{unit.seq} * params.q.num_heads + std::int64_t{unit.kv_head} * unit.group;
        index_.exact_scores(unit, begin, end, params.scores + row * params.token_stride,
                            params.token_stride);
      });
}

void CpuBackend::do_estimate_scores(const EstimateParams& params, Workspace workspace) {
  Arena arena(workspace.data, workspace.bytes);
  const auto row_of = [&](std::int32_t seq, std::int32_t head) {
    return std::int64_t{seq} * params.kv.num_kv_heads + head;
  };
  for_each_tile(
      pool_, params, arena, tile_pages(kEstimateTaskTokens, params.kv.page_size),
      [&](std::int32_t seq, std::int32_t head) { return params.page_counts[row_of(seq, head)]; },
      [&](const IndexUnit& unit, std::byte* query) {
        if (!params.exact_keys) index_.prepare_estimates(unit, query);
      },
      [&](const IndexUnit& unit, const std::byte* query, std::int64_t begin, std::int64_t end,
          float* row_max) {
        const std::int64_t row = row_of(unit.seq, unit.kv_head);
        index_.estimate(unit, query, params.exact_keys,
                        params.pages + row * params.candidate_stride, begin, end, {},
                        params.estimates + row * unit.group * params.estimate_stride,
                        params.estimate_stride, row_max);
      });
}

}  // namespace twilight::cpu
