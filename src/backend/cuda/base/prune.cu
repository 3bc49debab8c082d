#include <cmath>

#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/threshold.cuh"

// prune_top_p_kernel: a block per (KV head, sequence). Weights become fixed-point integers, whose
// sums do not depend on the order; a radix descent finds each threshold exactly, ties included; one
// pass in slot order writes the kept list. Weights are computed anew in every pass from the
// estimates. Bound by instructions. Tests: tests/cuda/select_cuda_test.cc.
namespace twilight::cuda::base {
namespace {

constexpr int kThreads = 512;
constexpr float kHeadUnit = 0x1p42F;   ///< of the row's largest weight: 2^21 of them fit 63 bits
constexpr float kGroupUnit = 0x1p60F;  ///< of the whole mass
constexpr float kSmallestNormal = 0x1p-126F;

/// Per query head, in dynamic shared memory.
struct HeadSums {
  float top;    ///< largest estimate; -inf where none takes part
  float total;  ///< sum of e^(estimate - top)
  float log_total;
  std::uint32_t threshold;  ///< key of the weakest kept; 0 keeps all that take part
  int count;                ///< of its own set, forced tokens included
  unsigned long long total_units;
  unsigned long long kept_units;
};

__device__ bool takes_part(float e) { return e > -INFINITY; }

__device__ float weight_of(float e, float top) {
  return !takes_part(e) ? 0.0F : e == top ? 1.0F : expf(e - top);
}

class Unit {
 public:
  __device__ Unit(const PruneParams& params, std::int64_t seq, int head, HeadSums* sums)
      : params_(params),
        unit_(seq * params.kv.num_kv_heads + head),
        group_(params.num_q_heads / params.kv.num_kv_heads),
        n_(params.kv.seq_lens[seq]),
        pages_(params.pages + unit_ * params.candidate_stride),
        num_pages_(params.page_counts[unit_]),
        slots_(num_pages_ * params.kv.page_size),
        sums_(sums) {}

  [[nodiscard]] __device__ float* row(int g) const {
    return params_.estimates + (unit_ * group_ + g) * params_.estimate_stride;
  }
  [[nodiscard]] __device__ int token_of(int slot) const {
    const int page_size = params_.kv.page_size;
    return pages_[slot / page_size] * page_size + slot % page_size;
  }

  __device__ void sum_heads(unsigned long long* units, float* tops) {
    for (int g = 0; g < group_; ++g) {
      const float* e = row(g);
      float top = -INFINITY;
      for (int i = threadIdx.x; i < slots_; i += kThreads) top = fmaxf(top, e[i]);
      top = block_reduce(top, Max(), tops);
      unsigned long long total = 0;
      for (int i = threadIdx.x; i < slots_; i += kThreads) {
        total += __float2ull_rn(weight_of(e[i], top) * kHeadUnit);
      }
      total = block_reduce(total, Sum<unsigned long long>(), units);
      if (threadIdx.x == 0) {
        const float sum = static_cast<float>(static_cast<double>(total) * 0x1p-42);
        sums_[g] = {top, sum, logf(sum), 0, 0, total, 0};
      }
    }
    __syncthreads();
  }

  /// A slot as one head ranks it: by its estimate.
  [[nodiscard]] __device__ RankedItem head_item(int g, float e) const {
    return {ordered_key(e), __float2ull_rn(weight_of(e, sums_[g].top) * kHeadUnit), takes_part(e)};
  }
  /// As the group ranks it: by the mean weight, and below the normal numbers, where f32 loses it,
  /// by the largest log weight of a head.
  [[nodiscard]] __device__ RankedItem group_item(int slot) const {
    float mean = 0;
    float log_weight = -INFINITY;
    bool any = false;
    for (int g = 0; g < group_; ++g) {
      const float e = row(g)[slot];
      if (!takes_part(e)) continue;
      any = true;
      mean += weight_of(e, sums_[g].top) / sums_[g].total;
      log_weight = fmaxf(log_weight, e - sums_[g].top - sums_[g].log_total);
    }
    mean /= static_cast<float>(group_);
    return {ordered_key(mean >= kSmallestNormal ? mean : log_weight),
            __float2ull_rn(mean * kGroupUnit), any};
  }

  /// Sets thresholds of the top-p sets.
  __device__ void find_sets(const DeviceProbabilities& p, ThresholdScratch& scratch,
                            unsigned long long* units) {
    const int least = max(params_.min_tokens, 1);
    if (params_.criterion == PruneCriterion::kPerHead) {
      for (int g = 0; g < group_; ++g) {
        const float wanted = p.at(unit_ * group_ + g);
        if (wanted >= 1) continue;
        const float* e = row(g);
        const Threshold at = find_threshold(
            slots_, [&](std::int64_t i) { return head_item(g, e[i]); },
            goal_of(wanted, sums_[g].total_units), least, scratch);
        if (threadIdx.x == 0) sums_[g].threshold = at.key;
      }
    } else {
      float wanted = 0;
      for (int g = 0; g < group_; ++g) wanted = fmaxf(wanted, p.at(unit_ * group_ + g));
      if (wanted < 1) {
        unsigned long long all = 0;
        for (int i = threadIdx.x; i < slots_; i += kThreads) all += group_item(i).mass;
        all = block_reduce(all, Sum<unsigned long long>(), units);
        const Threshold at = find_threshold(
            slots_, [&](std::int64_t i) { return group_item(static_cast<int>(i)); },
            goal_of(wanted, all), least, scratch);
        if (threadIdx.x == 0) sums_[0].threshold = at.key;
      }
    }
    __syncthreads();
  }

  /// Writes the kept list and what it says of each head; estimates become dropped weights where a
  /// tail is wanted.
  __device__ void write_kept(int* ranks) {
    const bool prunes = params_.criterion != PruneCriterion::kNone;
    const bool per_head = params_.criterion == PruneCriterion::kPerHead;
    const bool tail = params_.tail_mass != nullptr;
    int written = 0;
    for (int base = 0; base < slots_; base += kThreads) {
      const int slot = base + static_cast<int>(threadIdx.x);
      const int token = slot < slots_ ? token_of(slot) : n_;
      const bool always =
          token < n_ && (!prunes || params_.forced.contains(token, n_, params_.kv.page_size));
      bool kept = always;
      if (prunes && !per_head && slot < slots_) {
        const RankedItem item = group_item(slot);
        kept = kept || (item.takes_part && item.key >= sums_[0].threshold);
      }
      for (int g = 0; per_head && g < group_; ++g) {
        bool own = always;
        if (slot < slots_) {
          const float e = row(g)[slot];
          own = own || (takes_part(e) && ordered_key(e) >= sums_[g].threshold);
        }
        kept = kept || own;
        const int count = __popc(__ballot_sync(kFullMask, own));
        if (threadIdx.x % 32 == 0) atomicAdd(&sums_[g].count, count);
      }
      for (int g = 0; prunes && g < group_; ++g) {
        const float weight = slot < slots_ ? weight_of(row(g)[slot], sums_[g].top) : 0.0F;
        const auto units = warp_reduce(kept ? __float2ull_rn(weight * kHeadUnit) : 0ULL,
                                       Sum<unsigned long long>());
        if (threadIdx.x % 32 == 0) atomicAdd(&sums_[g].kept_units, units);
      }
      if (tail && slot < slots_) {
        for (int g = 0; g < group_; ++g) {
          row(g)[slot] = kept ? 0.0F : weight_of(row(g)[slot], sums_[g].top);
        }
      }
      int count = 0;
      const int rank = block_rank(kept, &count, ranks);
      if (kept) params_.kept[unit_ * params_.kept_stride + written + rank] = token;
      written += count;
    }
    if (threadIdx.x == 0) params_.kept_counts[unit_] = written;
    __syncthreads();
    for (int g = threadIdx.x; g < group_; g += kThreads) {
      const std::int64_t head = unit_ * group_ + g;
      params_.head_counts[head] = per_head ? sums_[g].count : written;
      params_.head_mass[head] = !prunes ? 1.0F
                                : sums_[g].total_units == 0
                                    ? 0.0F
                                    : static_cast<float>(static_cast<double>(sums_[g].kept_units) /
                                                         static_cast<double>(sums_[g].total_units));
      if (tail) params_.tail_shift[head] = sums_[g].top;
    }
    if (!tail) return;
    const int page_size = params_.kv.page_size;
    for (int i = threadIdx.x; i < num_pages_ * group_; i += kThreads) {
      const int page = i % num_pages_;
      const int g = i / num_pages_;
      const float* dropped = row(g) + page * page_size;
      float sum = 0;
      for (int slot = 0; slot < page_size; ++slot) sum += dropped[slot];
      params_.tail_mass[(unit_ * group_ + g) * params_.candidate_stride + page] = sum;
    }
  }

 private:
  __device__ static unsigned long long goal_of(float p, unsigned long long all) {
    return static_cast<unsigned long long>(ceil(static_cast<double>(p) * static_cast<double>(all)));
  }

  const PruneParams& params_;
  std::int64_t unit_;
  int group_;
  int n_;
  const std::int32_t* pages_;
  int num_pages_;
  int slots_;
  HeadSums* sums_;
};

__global__ void __launch_bounds__(kThreads)
    prune_top_p_kernel(const __grid_constant__ PruneParams params,
                       const __grid_constant__ DeviceSubset seqs,
                       const __grid_constant__ DeviceProbabilities p) {
  extern __shared__ __align__(8) unsigned char shared[];
  __shared__ ThresholdScratch scratch;
  __shared__ unsigned long long units[32];
  __shared__ float tops[32];
  __shared__ int ranks[32];
  Unit unit(params, seqs.at(blockIdx.y), static_cast<int>(blockIdx.x),
            reinterpret_cast<HeadSums*>(shared));
  if (params.criterion != PruneCriterion::kNone) {
    unit.sum_heads(units, tops);
    unit.find_sets(p, scratch, units);
  }
  unit.write_kept(ranks);
}

}  // namespace

void prune_top_p(const PruneParams& params, const DeviceSubset& seqs, const DeviceProbabilities& p,
                 cudaStream_t stream) {
  if (seqs.count == 0) return;
  const dim3 grid(static_cast<unsigned>(params.kv.num_kv_heads), static_cast<unsigned>(seqs.count));
  const int group = params.num_q_heads / params.kv.num_kv_heads;
  prune_top_p_kernel<<<grid, kThreads, static_cast<std::size_t>(group) * sizeof(HeadSums),
                       stream>>>(params, seqs, p);
  check_launch("prune_top_p");
}

}  // namespace twilight::cuda::base
