#include <algorithm>
#include <atomic>
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "core/buffer.h"
#include "core/check.h"

namespace twilight::cpu {
namespace {

// Tokens of one tile. Short lists still give every core something to do; the number of tiles of one
// list is bounded so that partial states stay small. Both depend on the list's length alone, so
// sums come out the same for any number of threads.
constexpr std::int64_t kDenseTile = 256;
constexpr std::int64_t kSparseTile = 512;
constexpr std::int64_t kMinTile = std::min(kDenseTile, kSparseTile);
constexpr std::int64_t kMaxTiles = 64;
// Dense sequences at least this long are cut into tiles of several heads; shorter ones would not
// give every core a task.
constexpr std::int64_t kManyHeadsTokens = 2048;

struct Tiling {
  std::int64_t tokens = 0;
  std::int64_t count = 0;
};

// Tiles of equal size up to a multiple of 32, the tokens the kernels take at once.
Tiling tiles_of(std::int64_t num_tokens, std::int64_t max_tile) {
  if (num_tokens == 0) return {};
  const std::int64_t wanted = std::min(kMaxTiles, (num_tokens + max_tile - 1) / max_tile);
  const std::int64_t tokens = ((num_tokens + wanted - 1) / wanted + 31) / 32 * 32;
  return {tokens, (num_tokens + tokens - 1) / tokens};
}

// The part the two ops share; `kept` null attends to all tokens.
struct Job {
  SeqSubset seqs;
  QueryView q;
  const PagedKvView& kv;
  float scale = 0;
  const std::int32_t* kept = nullptr;
  const std::int32_t* kept_counts = nullptr;
  std::int64_t kept_stride = 0;
  float* out = nullptr;
  std::int64_t out_seq_stride = 0;
  const TailParams* tail = nullptr;

  [[nodiscard]] bool has_tail(std::int64_t pair) const {
    if (tail == nullptr) return false;
    return tail->page_counts[list_of(pair)] > 0 ||
           (tail->log_masses != nullptr && kv.sealed_pages(seqs.at(pair / kv.num_kv_heads)) > 0);
  }
  // Partial states of a pair: its tiles, then the tail.
  [[nodiscard]] std::int64_t states_of(std::int64_t pair) const {
    return tiles_of(pair).count + (has_tail(pair) ? 1 : 0);
  }
  [[nodiscard]] Tiling tiles_of(std::int64_t pair) const {
    return twilight::cpu::tiles_of(length_of(pair), kept == nullptr ? kDenseTile : kSparseTile);
  }
  // KV heads from that of `pair` on that share its tiles.
  [[nodiscard]] std::int32_t heads_of(std::int64_t pair) const {
    if (kept != nullptr || length_of(pair) < kManyHeadsTokens) return 1;
    const auto head = static_cast<std::int32_t>(pair % kv.num_kv_heads);
    return std::min(attend_heads_per_tile(kv.head_dim), kv.num_kv_heads - head);
  }
  [[nodiscard]] std::int64_t list_of(std::int64_t pair) const {
    return static_cast<std::int64_t>(seqs.at(pair / kv.num_kv_heads)) * kv.num_kv_heads +
           pair % kv.num_kv_heads;
  }
  [[nodiscard]] std::int64_t length_of(std::int64_t pair) const {
    return kept == nullptr ? kv.seq_lens[seqs.at(pair / kv.num_kv_heads)]
                           : kept_counts[list_of(pair)];
  }
};

// The ragged list of tasks. Pair i is a (sequence, KV head) with partial states [first_tile[i],
// first_tile[i + 1]). Bundle j is the pairs [first_pair[j], first_pair[j + 1]) of one sequence,
// which are attended to together in the tasks [first_task[j], first_task[j + 1]), one for each
// tile.
struct Plan {
  std::int64_t* first_tile = nullptr;  // [pairs + 1]
  std::int64_t* first_task = nullptr;  // [pairs + 1]
  std::int64_t* first_pair = nullptr;  // [pairs + 1]
  std::int32_t* pending = nullptr;     // [pairs] tiles not done yet
  float* partials = nullptr;           // [tiles, attend_partial_floats]
  std::int64_t num_bundles = 0;

  void take_lists(Arena* arena, std::int64_t pairs) {
    first_tile = arena->take<std::int64_t>("tile offsets", pairs + 1);
    first_task = arena->take<std::int64_t>("task offsets", pairs + 1);
    first_pair = arena->take<std::int64_t>("bundle offsets", pairs + 1);
    pending = arena->take<std::int32_t>("tile counters", pairs);
  }
  void take_partials(Arena* arena, std::int64_t tiles, std::int64_t group, std::int64_t dim) {
    partials = arena->take<float>("partial states", tiles * attend_partial_floats(group, dim));
  }
  // Fills the lists.
  void lay_out(const Job& job, std::int64_t pairs) {
    first_tile[0] = 0;
    first_task[0] = 0;
    first_pair[0] = 0;
    num_bundles = 0;
    for (std::int64_t pair = 0; pair < pairs;) {
      const std::int64_t count = job.states_of(pair);
      const std::int64_t end = pair + job.heads_of(pair);
      for (; pair < end; ++pair) {
        first_tile[pair + 1] = first_tile[pair] + count;
        pending[pair] = static_cast<std::int32_t>(count);
      }
      first_task[num_bundles + 1] = first_task[num_bundles] + count;
      first_pair[++num_bundles] = end;
    }
  }
};

AttendTile make_tile(const Job& job, const Plan& plan, std::int64_t bundle, std::int64_t index) {
  const PagedKvView& kv = job.kv;
  const std::int64_t element_bytes = dtype_bytes(kv.dtype);
  const std::int64_t pair = plan.first_pair[bundle];
  const std::int64_t seq = job.seqs.at(pair / kv.num_kv_heads);
  const std::int64_t head = pair % kv.num_kv_heads;
  const Tiling tiling = job.tiles_of(pair);
  const std::int64_t begin = index * tiling.tokens;
  AttendTile tile;
  tile.dtype = kv.dtype;
  tile.group = job.q.num_heads / kv.num_kv_heads;
  tile.head_dim = kv.head_dim;
  tile.page_size = kv.page_size;
  tile.num_heads = static_cast<std::int32_t>(plan.first_pair[bundle + 1] - pair);
  tile.scale = job.scale;
  tile.q = job.q.data + seq * job.q.seq_stride + head * tile.group * kv.head_dim;
  tile.k = kv.k_rows(0, head);
  tile.v = kv.v_rows(0, head);
  tile.k_page_stride = kv.k.page_stride * element_bytes;
  tile.k_head_stride = kv.k.head_stride * element_bytes;
  tile.k_token_stride = kv.k.token_stride * element_bytes;
  tile.v_page_stride = kv.v.page_stride * element_bytes;
  tile.v_head_stride = kv.v.head_stride * element_bytes;
  tile.v_token_stride = kv.v.token_stride * element_bytes;
  tile.block_table = kv.block_table + seq * kv.block_table_stride;
  if (job.kept != nullptr) tile.tokens = job.kept + job.list_of(pair) * job.kept_stride + begin;
  tile.first_token = static_cast<std::int32_t>(begin);
  tile.num_tokens = static_cast<std::int32_t>(std::min(tiling.tokens, job.length_of(pair) - begin));
  const std::int64_t partial_floats = attend_partial_floats(tile.group, kv.head_dim);
  tile.partial = plan.partials + (plan.first_tile[pair] + index) * partial_floats;
  tile.partial_head_stride = tiling.count * partial_floats;
  return tile;
}

AttendTail make_tail(const Job& job, const Plan& plan, std::int64_t pair) {
  const PagedKvView& kv = job.kv;
  const TailParams& from = *job.tail;
  const std::int64_t seq = job.seqs.at(pair / kv.num_kv_heads);
  const std::int64_t head = pair % kv.num_kv_heads;
  const std::int64_t list = job.list_of(pair);
  AttendTail tail;
  tail.group = job.q.num_heads / kv.num_kv_heads;
  tail.head_dim = kv.head_dim;
  tail.mass = from.mass + list * tail.group * from.candidate_stride;
  tail.mass_stride = from.candidate_stride;
  tail.shift = from.shift + list * tail.group;
  tail.pages = from.pages + list * from.candidate_stride;
  tail.page_count = from.page_counts[list];
  if (from.log_masses != nullptr) {
    tail.log_masses = from.log_masses + list * tail.group * from.page_stride;
    tail.scores = from.scores + list * from.page_stride;
    tail.far_stride = from.page_stride;
    tail.sealed_pages = kv.sealed_pages(seq);
    tail.lowest_far_score = from.lowest_far_score(tail.sealed_pages);
  }
  tail.block_table = kv.block_table + seq * kv.block_table_stride;
  tail.codes = from.index.value_mean(0, head);
  tail.codes_stride = from.index.value_page_stride;
  tail.params = reinterpret_cast<const std::byte*>(from.index.page_params(0, head));
  tail.params_stride = from.index.params_page_stride;
  tail.partial = plan.partials +
                 (plan.first_tile[pair + 1] - 1) * attend_partial_floats(tail.group, kv.head_dim);
  return tail;
}

// Without a kept token, heads without tail mass give zeros: their state, the only one, becomes that
// of a zero value.
void fill_empty_heads(float* state, std::int64_t group, std::int64_t dim) {
  float* m = state + group * dim;
  float* l = m + group;
  for (std::int64_t h = 0; h < group; ++h) {
    if (l[h] != 0) continue;
    m[h] = 0;
    l[h] = 1;
  }
}

void run(const Job& job, Workspace workspace, ThreadPool& pool, const AttendKernels& kernels) {
  const std::int64_t dim = job.kv.head_dim;
  const std::int64_t heads = job.kv.num_kv_heads;
  const std::int64_t group = job.q.num_heads / heads;
  const std::int64_t pairs = job.seqs.count * heads;
  const auto out_of = [&](std::int64_t pair) {
    return job.out + job.seqs.at(pair / heads) * job.out_seq_stride + pair % heads * group * dim;
  };

  Arena arena(workspace.data, workspace.bytes);
  Plan plan;
  plan.take_lists(&arena, pairs);
  plan.lay_out(job, pairs);
  plan.take_partials(&arena, plan.first_tile[pairs], group, dim);
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    if (plan.pending[pair] == 0) std::fill_n(out_of(pair), group * dim, 0.0F);
  }

  pool.parallel_for(plan.first_task[plan.num_bundles], [&](std::int64_t task, int) {
    const std::int64_t bundle =
        std::upper_bound(plan.first_task, plan.first_task + plan.num_bundles + 1, task) -
        plan.first_task - 1;
    const std::int64_t index = task - plan.first_task[bundle];
    if (index < job.tiles_of(plan.first_pair[bundle]).count) {
      kernels.attend_tile(make_tile(job, plan, bundle, index));
    } else {
      kernels.attend_tail(make_tail(job, plan, plan.first_pair[bundle]));
    }

    // Whoever finishes a pair's last tile merges them, always in the order of the tiles.
    for (std::int64_t pair = plan.first_pair[bundle]; pair < plan.first_pair[bundle + 1]; ++pair) {
      const std::atomic_ref<std::int32_t> pending(plan.pending[pair]);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
      const std::int64_t first = plan.first_tile[pair];
      if (job.length_of(pair) == 0) {
        fill_empty_heads(plan.partials + first * attend_partial_floats(group, dim), group, dim);
      }
      kernels.merge_partials(plan.partials + first * attend_partial_floats(group, dim),
                             plan.first_tile[pair + 1] - first, group, dim, out_of(pair));
    }
  });
}

}  // namespace

std::size_t CpuBackend::attend_workspace_bytes(const StepCaps& caps) const {
  if (caps.num_kv_heads == 0) return 0;
  const std::int64_t pairs = static_cast<std::int64_t>(caps.max_seqs) * caps.num_kv_heads;
  const std::int64_t tiles = std::min(kMaxTiles, (caps.max_tokens + kMinTile - 1) / kMinTile) + 1;
  Arena arena;
  Plan plan;
  plan.take_lists(&arena, pairs);
  plan.take_partials(&arena, pairs * tiles, caps.num_q_heads / caps.num_kv_heads, caps.head_dim);
  return arena.used_bytes();
}

void CpuBackend::do_attend_dense(const AttendDenseParams& params, Workspace workspace) {
  const Job job = {params.seqs, params.q, params.kv,  params.scale,          nullptr,
                   nullptr,     0,        params.out, params.out_seq_stride, nullptr};
  run(job, workspace, pool_, attend_);
}

void CpuBackend::do_attend_sparse(const AttendSparseParams& params, Workspace workspace) {
  const Job job = {params.seqs,
                   params.q,
                   params.kv,
                   params.scale,
                   params.kept,
                   params.kept_counts,
                   params.kept_stride,
                   params.out,
                   params.out_seq_stride,
                   params.tail.mass == nullptr ? nullptr : &params.tail};
  run(job, workspace, pool_, attend_);
}

void CpuBackend::do_attend_prefill(const AttendPrefillParams& params) { prefill_.run(params); }

}  // namespace twilight::cpu
