#ifndef TWILIGHT_BACKEND_CPU_PREFILL_ATTENTION_H_
#define TWILIGHT_BACKEND_CPU_PREFILL_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/cpu/dnnl_gemm.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/prefill.h"
#include "core/buffer.h"
#include "ops/params.h"

namespace twilight {
class ThreadPool;
}

namespace twilight::cpu {

/// Causal attention of a chunk of new tokens against the paged cache, in tiles with an online
/// softmax; memory is O(T + tile), never O(T N).
///
/// For each KV head the G query heads of a run of tokens are stacked as the rows of one matrix, row
/// = token * G + g. Keys go by in blocks: a block is first gathered from its pages into dense tiles
/// of the compute type (once, for all queries), then every query tile takes S = Q K^T, the softmax
/// weights P and O += P V through oneDNN. Compute type bf16 (Q, K, P, V rounded to bf16, f32 sums)
/// where the machine has the instructions and the chosen instruction set allows them, f32 elsewhere
/// and for `full_precision`.
///
/// Work is cut by shapes alone, so results do not depend on the number of threads. Scratch grows to
/// the largest shape seen; calls after that allocate nothing of ours. Not thread-safe.
class PrefillAttention {
 public:
  /// `pool` must outlive the object.
  PrefillAttention(ThreadPool& pool, Isa isa);

  /// head_dim must be a multiple of 16; throws Error(kInvalidArgument) otherwise.
  void run(const AttendPrefillParams& params);

  [[nodiscard]] bool uses_bf16() const { return bf16_; }

 private:
  struct Worker {
    DnnlGemm gemm;
    Buffer scratch;
  };
  struct Plan;

  void gather_tile(const AttendPrefillParams& params, const Plan& plan, std::int64_t block_begin,
                   std::int64_t head, std::int64_t tile);
  void attend_tile(const AttendPrefillParams& params, const Plan& plan, std::int64_t block_begin,
                   std::int64_t head, std::int64_t query_tile, Worker& worker);

  ThreadPool& pool_;
  const PrefillKernels& kernels_;
  bool bf16_;
  std::vector<Worker> workers_;
  Buffer keys_;    ///< [Hkv, block tokens, D] of the compute type
  Buffer values_;  ///< likewise
  Buffer state_;   ///< running maximum and sum of every query row, [2, Hkv, query rows]
};

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_PREFILL_ATTENTION_H_
