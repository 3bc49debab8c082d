#ifndef TWILIGHT_BACKEND_CUDA_CUDNN_ATTENTION_H_
#define TWILIGHT_BACKEND_CUDA_CUDNN_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include <cuda_runtime_api.h>

#include "ops/backend.h"
#include "twilight/types.h"

namespace twilight::cuda {

/// Fixed for the life of a plan. Strides in elements.
struct CudnnDecodeShape {
  DType dtype = DType::kBf16;  ///< of q, k, v and out: bf16 or f16
  std::int64_t num_seqs = 0;   ///< B
  std::int64_t num_q_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_tokens = 0;  ///< longest N; without lengths the N of every sequence
  /// Whether the lengths come from memory, and tokens behind them are not read.
  bool has_lengths = false;
  /// 0: contiguous, row (sequence, head, token). Otherwise P, row (page, head, slot) through a
  /// table [B, ceil(max_tokens / P)]; needs has_lengths.
  std::int64_t page_size = 0;
  std::int64_t num_pages = 0;     ///< of the pool
  std::int64_t outer_stride = 0;  ///< between sequences, or pages
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
};

struct CudnnDecodeArgs {
  const void* q = nullptr;  ///< [B, Hq, D] dense
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;                  ///< [B, Hq, D] dense
  const std::int32_t* table = nullptr;  ///< [B, ceil(max_tokens / P)] dense
  const std::int32_t* seq_lens = nullptr;
  float scale = 0;
  void* workspace = nullptr;
};

/// Dense decode attention by cuDNN (9.15 or later), as its one attention operation: the baseline of
/// benchmarks. Not thread-safe.
class CudnnDecode {
 public:
  /// Whether the library is there, and its version.
  [[nodiscard]] static Support available(std::string* version = nullptr);
  /// Null where the library has no engine for the shape; `why` then holds its words. Takes seconds:
  /// kernels are compiled.
  [[nodiscard]] static std::unique_ptr<CudnnDecode> make(const CudnnDecodeShape& shape,
                                                         std::string* why);
  ~CudnnDecode();

  [[nodiscard]] std::size_t workspace_bytes() const;
  /// Launches only; may be captured in a graph.
  void run(const CudnnDecodeArgs& args, cudaStream_t stream);

 private:
  struct Impl;
  explicit CudnnDecode(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace twilight::cuda

#endif  // TWILIGHT_BACKEND_CUDA_CUDNN_ATTENTION_H_
