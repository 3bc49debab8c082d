#ifndef TWILIGHT_BACKEND_CUDA_BASE_ATTEND_CUH_
#define TWILIGHT_BACKEND_CUDA_BASE_ATTEND_CUH_

#include <cmath>
#include <cstdint>

#include "backend/cuda/base/attend_args.h"
#include "backend/cuda/device/elements.cuh"
#include "backend/cuda/device/records.cuh"
#include "backend/cuda/device/reduce.cuh"
#include "core/float16.h"

// attend_kernel: decode attention over all tokens or a list, and the tail, under one online
// softmax. Grid: (split of the list, KV head x block of its query heads, sequence); 4 warps. A
// group of 8 lanes takes a token: each lane holds channels 8 (lane + 8 c) .. + 7. Splits follow
// from the list's length alone, so a sequence gets the same bits in every batch. Shared memory: the
// warps' results for one merge. Bound by bytes of K and V. Tests: tests/cuda/attend_cuda_test.cc.
namespace twilight::cuda::base {

constexpr int kAttendThreads = 128;

/// Running softmax of kHeads query heads over the tokens one group of lanes has seen; log2 scores.
template <int kHeads>
struct AttendState {
  float max[kHeads];
  float sum[kHeads];
  float acc[kHeads][8];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      max[h] = -INFINITY;
      sum[h] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[h][i] = 0;
    }
  }
  /// Raises a head's maximum; returns the shift to subtract from scores (0 while all are -inf).
  __device__ float raise(int h, float score) {
    const float top = fmaxf(max[h], score);
    const float shift = top == -INFINITY ? 0.0F : top;
    if (top != max[h]) {
      const float factor = exp2f(max[h] - shift);
      sum[h] *= factor;
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[h][i] *= factor;
      max[h] = top;
    }
    return shift;
  }
  /// Adds the state of another group of lanes.
  __device__ void merge(int h, float other_max, float other_sum, float my_factor,
                        float other_factor) {
    max[h] = fmaxf(max[h], other_max);
    sum[h] = sum[h] * my_factor + other_sum * other_factor;
  }
};

template <int kLanes, int kHeads>
__device__ void merge_lanes(AttendState<kHeads>& state) {
#pragma unroll
  for (int step = 16; step >= kLanes; step /= 2) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float other_max = __shfl_xor_sync(kFullMask, state.max[h], step);
      const float top = fmaxf(state.max[h], other_max);
      const float shift = top == -INFINITY ? 0.0F : top;
      const float mine = exp2f(state.max[h] - shift);
      const float other = exp2f(other_max - shift);
      const float other_sum = __shfl_xor_sync(kFullMask, state.sum[h], step);
      state.merge(h, other_max, other_sum, mine, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float theirs = __shfl_xor_sync(kFullMask, state.acc[h][i], step);
        state.acc[h][i] = state.acc[h][i] * mine + theirs * other;
      }
    }
  }
}

/// What dropped tokens add, page by page: mean values times mass. One group of lanes each.
template <int kHeads>
struct TailPages {
  const AttendArgs& args;
  std::int64_t unit;  ///< (sequence, KV head)
  int kv_head;
  int first_head;  ///< in the group
  int lane;
  const std::int32_t* table;  ///< the sequence's physical pages

  using State = AttendState<kHeads>;

  [[nodiscard]] __device__ int group() const { return args.q.num_heads / args.kv.num_kv_heads; }
  [[nodiscard]] __device__ std::int64_t head_row(int h) const {
    return unit * group() + first_head + h;
  }

  __device__ void add_candidate(int i, State& state) const {
    const TailParams& tail = args.tail;
    float mass[kHeads];
    float score[kHeads];
    bool any = false;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const bool exists = first_head + h < group();
      mass[h] = exists ? tail.mass[head_row(h) * tail.candidate_stride + i] : 0.0F;
      score[h] = exists ? tail.shift[head_row(h)] * kLog2E : 0.0F;
      any = any || mass[h] > 0;
    }
    if (any) add(tail.pages[unit * tail.candidate_stride + i], mass, score, state);
  }

  __device__ void add_far(int page, float lowest, int candidates, State& state) const {
    const TailParams& tail = args.tail;
    if (!(tail.scores[unit * tail.page_stride + page] >= lowest)) return;
    const std::int32_t* pages = tail.pages + unit * tail.candidate_stride;
    int low = 0;
    for (int high = candidates; low < high;) {
      const int middle = (low + high) / 2;
      if (pages[middle] < page) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low < candidates && pages[low] == page) return;
    float mass[kHeads];
    float score[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const bool exists = first_head + h < group();
      mass[h] = exists ? 1.0F : 0.0F;
      score[h] = exists ? tail.log_masses[head_row(h) * tail.page_stride + page] * kLog2E : 0.0F;
    }
    add(page, mass, score, state);
  }

  /// Weight mass * 2^score of each head; heads without mass are left out.
  __device__ void add(int page_idx, const float (&mass)[kHeads], const float (&score)[kHeads],
                      State& state) const {
    const KeyIndexView& index = args.tail.index;
    const std::int64_t page = table[page_idx];
    const auto* codes = reinterpret_cast<const std::uint32_t*>(index.value_mean(page, kv_head));
    const float step = f16_to_f32(page_params_of(index, page, kv_head)->value_scale);
    // Lanes past the last channel hold nothing that is written.
    const std::uint32_t word = lane < args.kv.head_dim / 8 ? codes[lane] : 0;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (!(mass[h] > 0)) continue;
      const float weight = mass[h] * exp2f(score[h] - state.raise(h, score[h]));
      state.sum[h] += weight;
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        // nibble_place: channel b of a run is byte b % 4, the high nibble for b of 4 or more.
        const unsigned code = word >> (8 * (b % 4) + (b >= 4 ? 4 : 0)) & 15U;
        state.acc[h][b] = fmaf(weight, step * (static_cast<float>(code) - 7.5F), state.acc[h][b]);
      }
    }
  }
};

template <typename T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kAttendThreads, kHeads == 1   ? 6
                                                  : kHeads <= 4 ? 4
                                                                : 2)
    attend_kernel(const __grid_constant__ AttendArgs args) {
  constexpr int kWarps = kAttendThreads / 32;
  constexpr int kGroups = kAttendThreads / kLanes;
  constexpr int kRow = kLanes * 8;
  constexpr int kUnroll = sizeof(T) == 2 && kHeads <= 4 ? 4 : 2;
  __shared__ float warp_acc[kWarps][kHeads][kRow];
  __shared__ float warp_max[kWarps][kHeads];
  __shared__ float warp_sum[kWarps][kHeads];

  const PagedKvView& kv = args.kv;
  const int head_dim = kv.head_dim;
  const int group = args.q.num_heads / kv.num_kv_heads;
  const int head_blocks = (group + kHeads - 1) / kHeads;
  const std::int64_t seq = args.seqs.at(blockIdx.z);
  const int kv_head = blockIdx.y / head_blocks;
  const int first_head = blockIdx.y % head_blocks * kHeads;
  const std::int64_t unit = seq * kv.num_kv_heads + kv_head;
  const int count = args.kept != nullptr ? args.kept_counts[unit] : kv.seq_lens[seq];
  const int splits = num_splits(count);
  const int split = blockIdx.x;
  if (split >= splits) return;
  const int begin = split_begin(count, splits, split);
  const int end = split_begin(count, splits, split + 1);

  const int lane = threadIdx.x % kLanes;
  const int token_group = threadIdx.x / kLanes;
  const bool has_channels = lane < head_dim / 8;
  float q[kHeads][8];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const std::int64_t head = std::int64_t{kv_head} * group + first_head + h;
    const float* row = args.q.data + seq * args.q.seq_stride + head * head_dim + lane * 8;
    const bool valid = has_channels && first_head + h < group;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[h][i] = valid ? row[i] * args.scale_log2 : 0.0F;
  }

  AttendState<kHeads> state;
  state.clear();
  const std::int32_t* kept = args.kept != nullptr ? args.kept + unit * args.kept_stride : nullptr;
  const std::int32_t* table = kv.block_table + seq * kv.block_table_stride;
  for (int base = begin; base < end; base += kGroups * kUnroll) {
    Raw8<T> k[kUnroll];
    Raw8<T> v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = base + u * kGroups + token_group;
      if (at < end && has_channels) {
        const int token = kept != nullptr ? kept[at] : at;
        const int page_idx = args.page_shift >= 0 ? token >> args.page_shift : token / kv.page_size;
        const int slot = token - page_idx * kv.page_size;
        const std::int64_t page = table[page_idx];
        k[u].load(row_of<T>(kv, kv.k, page, kv_head, slot) + lane * 8, args.aligned);
        v[u].load(row_of<T>(kv, kv.v, page, kv_head, slot) + lane * 8, args.aligned);
      } else {
        k[u].clear();
        v[u].clear();
      }
    }
    float score[kUnroll][kHeads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[8];
      k[u].get(x);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        score[u][h] = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) score[u][h] = fmaf(q[h][i], x[i], score[u][h]);
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
          score[u][h] += __shfl_xor_sync(kFullMask, score[u][h], step);
        }
        if (base + u * kGroups + token_group >= end) score[u][h] = -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float top = score[0][h];
#pragma unroll
      for (int u = 1; u < kUnroll; ++u) top = fmaxf(top, score[u][h]);
      const float shift = state.raise(h, top);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[u][h] = exp2f(score[u][h] - shift);  // now the weight
        state.sum[h] += score[u][h];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[8];
      v[u].get(x);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) state.acc[h][i] = fmaf(score[u][h], x[i], state.acc[h][i]);
      }
    }
  }

  if (args.tail.mass != nullptr) {
    const TailPages<kHeads> tail{args, unit, kv_head, first_head, lane, table};
    const int candidates = args.tail.page_counts[unit];
    const int candidates_end = split_begin(candidates, splits, split + 1);
    for (int i = split_begin(candidates, splits, split) + token_group; i < candidates_end;
         i += kGroups) {
      tail.add_candidate(i, state);
    }
    if (args.tail.log_masses != nullptr) {
      const int sealed = kv.seq_lens[seq] / kv.page_size;
      const float lowest = logf(args.tail.far_floor / static_cast<float>(sealed));
      const int sealed_end = split_begin(sealed, splits, split + 1);
      for (int page = split_begin(sealed, splits, split) + token_group; page < sealed_end;
           page += kGroups) {
        tail.add_far(page, lowest, candidates, state);
      }
    }
    __syncwarp();
  }

  merge_lanes<kLanes>(state);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (lane == 0) {
        warp_max[warp][h] = state.max[h];
        warp_sum[warp][h] = state.sum[h];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) warp_acc[warp][h][lane * 8 + i] = state.acc[h][i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (first_head + h >= group) break;
    float top = warp_max[0][h];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, warp_max[w][h]);
    const float shift = top == -INFINITY ? 0.0F : top;
    float factor[kWarps];
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = exp2f(warp_max[w][h] - shift);
      sum = fmaf(factor[w], warp_sum[w][h], sum);
    }
    const std::int64_t head = std::int64_t{kv_head} * group + first_head + h;
    float* partial =
        args.partials + ((seq * args.q.num_heads + head) * kMaxSplits + split) * (head_dim + 2);
    float* out = splits == 1 ? args.out + seq * args.out_seq_stride + head * head_dim : partial + 2;
    if (splits > 1 && threadIdx.x == 0) {
      partial[0] = top;
      partial[1] = sum;
    }
    for (int d = threadIdx.x; d < head_dim; d += kAttendThreads) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total = fmaf(factor[w], warp_acc[w][h][d], total);
      out[d] = splits > 1 ? total : sum == 0 ? 0.0F : total / sum;
    }
  }
}

template <typename T, int kLanes, int kHeads>
void launch_attend(const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  const int group = args.q.num_heads / args.kv.num_kv_heads;
  grid.y = static_cast<unsigned>(args.kv.num_kv_heads * ((group + kHeads - 1) / kHeads));
  attend_kernel<T, kLanes, kHeads><<<grid, kAttendThreads, 0, stream>>>(args);
}

template <typename T, int kLanes>
void launch_attend_for_group(const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  const int group = args.q.num_heads / args.kv.num_kv_heads;
  if (group == 1) return launch_attend<T, kLanes, 1>(args, grid, stream);
  if (group <= 4) return launch_attend<T, kLanes, 4>(args, grid, stream);
  launch_attend<T, kLanes, 8>(args, grid, stream);
}

/// D up to 64, 128 or 256 channels.
template <typename T>
void launch_attend_for(const AttendArgs& args, dim3 grid, cudaStream_t stream) {
  if (args.kv.head_dim <= 64) return launch_attend_for_group<T, 8>(args, grid, stream);
  if (args.kv.head_dim <= 128) return launch_attend_for_group<T, 16>(args, grid, stream);
  launch_attend_for_group<T, 32>(args, grid, stream);
}

}  // namespace twilight::cuda::base

#endif  // TWILIGHT_BACKEND_CUDA_BASE_ATTEND_CUH_
