#ifndef TWILIGHT_BACKEND_CPU_DNNL_MATMUL_H_
#define TWILIGHT_BACKEND_CPU_DNNL_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/cpu/dnnl_gemm.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/blocks.h"
#include "backend/cpu/kernels/prefill.h"
#include "core/buffer.h"
#include "ops/params.h"

namespace twilight {
class ThreadPool;
}

namespace twilight::cpu {

/// Linear layers over many rows (prefill) through oneDNN.
///
/// Two ways to compute: bf16 (x and W rounded to bf16, exact products, f32 sums) where the machine
/// has bf16 instructions and the chosen instruction set allows them, f32 elsewhere and for
/// `full_precision`. A bf16 weight in bf16 mode, and an f32 one in f32 mode, is read in place;
/// others, quantised blocks among them, are converted tile by tile, so no second copy of the
/// weights ever exists.
///
/// Work is cut by the shape alone, so results do not depend on the number of threads. Scratch grows
/// to the largest shape seen; calls after that allocate nothing of ours. Not thread-safe.
class DnnlMatmul {
 public:
  /// `pool` must outlive the object.
  DnnlMatmul(ThreadPool& pool, Isa isa);

  void run(const LinearParams& params);

  /// Whether products are bf16 unless `full_precision` is asked for.
  [[nodiscard]] bool uses_bf16() const { return bf16_; }

 private:
  struct Worker {
    DnnlGemm gemm;
    Buffer weight;  ///< one converted tile of W, [kTileCols, K]
    Buffer tile;    ///< [kTileRows, kTileCols] f32
  };

  void convert(const WeightView& weight, const std::byte* from, std::int64_t count, bool bf16,
               std::byte* to) const;
  void run_block(const LinearParams& params, std::int64_t first_row, std::int64_t rows, bool bf16);

  ThreadPool& pool_;
  const PrefillKernels& kernels_;
  const BlockKernels& blocks_;
  bool bf16_;
  std::vector<Worker> workers_;
  Buffer x_;  ///< rows of one block in the compute type, [rows, K]
};

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_DNNL_MATMUL_H_
