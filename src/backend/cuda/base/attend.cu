#include <bit>
#include <cmath>

#include "backend/cuda/base/attend_args.h"
#include "backend/cuda/base/base_ops.h"
#include "backend/cuda/base/launch.h"
#include "backend/cuda/cuda_check.h"

namespace twilight::cuda::base {
namespace {

constexpr int kCombineThreads = 64;

/// Merges the partial results of one (query head, sequence) in the order of the splits.
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ AttendArgs args) {
  const PagedKvView& kv = args.kv;
  const std::int64_t seq = args.seqs.at(blockIdx.y);
  const int head = blockIdx.x;
  const int group = args.q.num_heads / kv.num_kv_heads;
  const int count = args.kept != nullptr ? args.kept_counts[seq * kv.num_kv_heads + head / group]
                                         : kv.seq_lens[seq];
  const int splits = num_splits(count);
  if (splits == 1) return;
  const std::int64_t stride = kv.head_dim + 2;
  const float* parts = args.partials + (seq * args.q.num_heads + head) * kMaxSplits * stride;
  float top = -INFINITY;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, parts[s * stride]);
  const float shift = top == -INFINITY ? 0.0F : top;
  float sum = 0;
  for (int s = 0; s < splits; ++s) {
    sum = fmaf(exp2f(parts[s * stride] - shift), parts[s * stride + 1], sum);
  }
  float* out = args.out + seq * args.out_seq_stride + std::int64_t{head} * kv.head_dim;
  for (int d = threadIdx.x; d < kv.head_dim; d += kCombineThreads) {
    float total = 0;
    for (int s = 0; s < splits; ++s) {
      total = fmaf(exp2f(parts[s * stride] - shift), parts[s * stride + 2 + d], total);
    }
    out[d] = sum == 0 ? 0.0F : total / sum;
  }
}

void attend(AttendArgs args, std::int64_t capacity_tokens, Arena& arena, cudaStream_t stream) {
  if (args.seqs.count == 0) return;
  const PagedKvView& kv = args.kv;
  args.partials = arena.take<float>("attention partials",
                                    attend_floats(kv.num_seqs, args.q.num_heads, kv.head_dim));
  if (std::has_single_bit(static_cast<unsigned>(kv.page_size))) {
    args.page_shift = std::countr_zero(static_cast<unsigned>(kv.page_size));
  }
  args.aligned = aligned_rows(kv.k, kv.dtype) && aligned_rows(kv.v, kv.dtype);
  const int splits = num_splits(static_cast<int>(
      std::min<std::int64_t>(capacity_tokens, std::int64_t{kMaxSplits} * kSplitTokens)));
  const dim3 grid(static_cast<unsigned>(splits), 1, static_cast<unsigned>(args.seqs.count));
  switch (kv.dtype) {
    case DType::kBf16:
      launch_attend_bf16(args, grid, stream);
      break;
    case DType::kF16:
      launch_attend_f16(args, grid, stream);
      break;
    case DType::kF32:
      launch_attend_f32(args, grid, stream);
      break;
  }
  check_launch("attend");
  if (splits == 1) return;
  combine_splits_kernel<<<dim3(static_cast<unsigned>(args.q.num_heads),
                               static_cast<unsigned>(args.seqs.count)),
                          kCombineThreads, 0, stream>>>(args);
  check_launch("combine_splits");
}

}  // namespace

std::int64_t attend_floats(std::int64_t num_seqs, std::int64_t num_q_heads, std::int64_t head_dim) {
  return num_seqs * num_q_heads * kMaxSplits * (head_dim + 2);
}

void attend_dense(const AttendDenseParams& params, const DeviceSubset& seqs, Arena& arena,
                  cudaStream_t stream) {
  AttendArgs args;
  args.seqs = seqs;
  args.q = params.q;
  args.kv = params.kv;
  args.scale_log2 = params.scale * kLog2E;
  args.out = params.out;
  args.out_seq_stride = params.out_seq_stride;
  attend(args, params.kv.block_table_stride * params.kv.page_size, arena, stream);
}

void attend_sparse(const AttendSparseParams& params, const DeviceSubset& seqs, Arena& arena,
                   cudaStream_t stream) {
  AttendArgs args;
  args.seqs = seqs;
  args.q = params.q;
  args.kv = params.kv;
  args.scale_log2 = params.scale * kLog2E;
  args.kept = params.kept;
  args.kept_counts = params.kept_counts;
  args.kept_stride = params.kept_stride;
  args.tail = params.tail;
  args.out = params.out;
  args.out_seq_stride = params.out_seq_stride;
  attend(args, params.kept_stride, arena, stream);
}

}  // namespace twilight::cuda::base
