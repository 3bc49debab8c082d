#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/threshold.cuh"

// select_pages_kernel: a block per (KV head, sequence). A radix descent on the scores' ordered keys
// finds the weakest page taken; masses are fixed-point integers, so nothing depends on order.
// Bound by latency. Tests: tests/cuda/select_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 512;
constexpr float kMassUnit = 0x1p40F;  ///< of the best page's mass

/// Pages [begin, end) without a forced token; the others are forced.
struct FreePages {
  int total = 0;
  int sealed = 0;
  int begin = 0;
  int end = 0;

  __device__ FreePages(const SelectPagesParams& params, int n) {
    const int page_size = params.kv.page_size;
    total = (n + page_size - 1) / page_size;
    sealed = n / page_size;
    begin = static_cast<int>(
        min(static_cast<long long>(total),
            (static_cast<long long>(params.forced.sink_tokens) + page_size - 1) / page_size));
    end = max(begin, max(0, sealed - params.forced.recent_pages));
  }
  __device__ int forced() const { return total - (end - begin); }
};

/// How many free pages the rule takes.
__device__ int pages_to_take(const SelectPagesParams& params, const FreePages& pages, int n,
                             const float* scores, ThresholdScratch& scratch,
                             unsigned long long* sums, float* tops) {
  const int free = pages.end - pages.begin;
  const std::int64_t wanted = params.budget_pages(n) - pages.forced();
  int take =
      static_cast<int>(min(static_cast<long long>(free), max(0LL, static_cast<long long>(wanted))));
  if (!(params.mass > 0) || take == 0) return take;
  float top = -INFINITY;
  for (int i = threadIdx.x; i < pages.sealed; i += kThreads) top = fmaxf(top, scores[i]);
  top = block_reduce(top, Max(), tops);
  const auto mass_of = [&](float score) -> unsigned long long {
    return isnan(score) || isinf(top) ? 0ULL : __float2ull_rn(expf(score - top) * kMassUnit);
  };
  unsigned long long all = 0;
  unsigned long long taken = 0;
  for (int i = threadIdx.x; i < pages.sealed; i += kThreads) {
    const unsigned long long mass = mass_of(scores[i]);
    all += mass;
    if (i < pages.begin || i >= pages.end) taken += mass;
  }
  all = block_reduce(all, Sum<unsigned long long>(), sums);
  taken = block_reduce(taken, Sum<unsigned long long>(), sums);
  const auto goal = static_cast<unsigned long long>(ceil(params.mass * static_cast<double>(all)));
  int needed = 0;
  if (taken < goal) {
    const unsigned long long missing = goal - taken;
    const Threshold at = find_threshold(
        free,
        [&](std::int64_t i) {
          const float score = scores[pages.begin + i];
          return RankedItem{ordered_key(score), mass_of(score), true};
        },
        missing, 1, scratch);
    needed = free;
    if (at.reached) {
      // Pages that tie have one mass: as many of them as are missing.
      unsigned long long tie = 0;
      for (int i = pages.begin + static_cast<int>(threadIdx.x); i < pages.end; i += kThreads) {
        if (ordered_key(scores[i]) == at.key) tie = mass_of(scores[i]);
      }
      tie = block_reduce(
          tie, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; }, sums);
      needed = at.count_above + static_cast<int>((missing - at.mass_above + tie - 1) / tie);
    }
  }
  const int floor = (params.mass_floor + params.kv.page_size - 1) / params.kv.page_size;
  return min(take, max(needed, floor - pages.forced()));
}

__global__ void __launch_bounds__(kThreads)
    select_pages_kernel(const __grid_constant__ SelectPagesParams params,
                        const __grid_constant__ DeviceSubset seqs) {
  __shared__ ThresholdScratch scratch;
  __shared__ unsigned long long sums[32];
  __shared__ float tops[32];
  __shared__ int ranks[32];
  const std::int64_t seq = seqs.at(blockIdx.y);
  const std::int64_t unit = seq * params.kv.num_kv_heads + blockIdx.x;
  const int n = params.kv.seq_lens[seq];
  const FreePages pages(params, n);
  std::int32_t* list = params.pages + unit * params.candidate_stride;
  if (params.mode == SelectMode::kAll) {
    for (int i = threadIdx.x; i < pages.total; i += kThreads) list[i] = i;
    if (threadIdx.x == 0) params.page_counts[unit] = pages.total;
    return;
  }
  int take = 0;
  Threshold at{};
  const float* scores = nullptr;
  if (params.mode == SelectMode::kByScore) {
    scores = params.scores + unit * params.page_stride;
    take = pages_to_take(params, pages, n, scores, scratch, sums, tops);
    if (take > 0 && take < pages.end - pages.begin) {
      at = find_threshold(
          pages.end - pages.begin,
          [&](std::int64_t i) {
            return RankedItem{ordered_key(scores[pages.begin + i]), 0, true};
          },
          0, take, scratch);
    }
  }
  const bool everything = take > 0 && take == pages.end - pages.begin;
  int ties_left = take - at.count_above;
  int written = 0;
  for (int base = 0; base < pages.total; base += kThreads) {
    const int page = base + static_cast<int>(threadIdx.x);
    const bool exists = page < pages.total;
    const bool free = page >= pages.begin && page < pages.end;
    bool taken = exists && (!free || everything);
    if (take > 0 && !everything) {  // the same for the whole block
      const std::uint32_t key = exists && free ? ordered_key(scores[page]) : 0;
      const bool tie = exists && free && key == at.key;
      int ties = 0;
      const int tie_rank = block_rank(tie, &ties, ranks);
      taken = taken || (exists && free && key > at.key) || (tie && tie_rank < ties_left);
      ties_left -= ties;
    }
    int count = 0;
    const int rank = block_rank(taken, &count, ranks);
    if (taken) list[written + rank] = page;
    written += count;
  }
  if (threadIdx.x == 0) params.page_counts[unit] = written;
}

}  // namespace

void select_pages(const SelectPagesParams& params, const DeviceSubset& seqs, cudaStream_t stream) {
  if (seqs.count == 0) return;
  const dim3 grid(static_cast<unsigned>(params.kv.num_kv_heads), static_cast<unsigned>(seqs.count));
  select_pages_kernel<<<grid, kThreads, 0, stream>>>(params, seqs);
  check_launch("select_pages");
}

}  // namespace twilight::cuda::base
