#ifndef TWILIGHT_BENCH_CUDA_BENCH_DATA_H_
#define TWILIGHT_BENCH_CUDA_BENCH_DATA_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

/// Keys, values and queries for benchmarks, made on the device: every (sequence, KV head) has its
/// own random cache, and heavy tokens that its queries attend to.
namespace twilight::bench {

/// Scores are q . k / sqrt(D). Ordinary tokens score about N(0, 1.2^2). Heavy ones come in runs of
/// 8 positions, score about N(7.5, 1.9^2) more, and number about heavy_tokens times a log-normal
/// factor of each (sequence, KV head), so that top-p budgets differ widely between heads.
struct DataShape {
  std::int32_t num_seqs = 0;
  std::int32_t tokens = 0;  ///< N of every sequence, a multiple of 16
  std::int32_t num_q_heads = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t head_dim = 128;
  float heavy_tokens = 900;
  float heavy_spread = 0.6F;  ///< standard deviation of the factor's logarithm
};

/// Fills pools laid out [head, page, 16, D] (bf16) through a table [num_seqs, N / 16]; q is
/// [num_seqs, Hq, D] f32 and q16 the same in bf16. Host call, runs on the default stream.
void make_data(const DataShape& shape, std::int64_t pool_pages, const std::int32_t* table, void* k,
               void* v, float* q, void* q16);

/// Sums `bytes` of memory; for the read peak.
void read_memory(const void* data, std::size_t bytes, void* sink, int blocks, cudaStream_t stream);

}  // namespace twilight::bench

#endif  // TWILIGHT_BENCH_CUDA_BENCH_DATA_H_
