#ifndef TWILIGHT_BACKEND_CPU_DNNL_GEMM_H_
#define TWILIGHT_BACKEND_CPU_DNNL_GEMM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "backend/cpu/isa.h"

namespace twilight::cpu {

/// c[m, n] = a[m, k] b, plus c itself where `accumulate`. All three are dense and row-major:
/// oneDNN takes its fast path only then (with other strides oneDNN 2.6 goes to a slower kernel).
struct GemmShape {
  std::int32_t m = 0;
  std::int32_t n = 0;
  std::int32_t k = 0;
  bool bf16 = false;          ///< a and b are bf16, else f32; c is f32
  bool b_transposed = false;  ///< b is [n, k], else [k, n]
  bool accumulate = false;

  bool operator==(const GemmShape&) const = default;
};

/// Single-threaded matrix products through oneDNN for one worker of a pool. Primitives are cached
/// by shape (bounded), scratch grows to the largest. Not thread-safe: one object per worker.
/// oneDNN's own OpenMP setting of the calling thread is put back after each call.
class DnnlGemm {
 public:
  DnnlGemm();
  ~DnnlGemm();
  DnnlGemm(DnnlGemm&&) noexcept;
  DnnlGemm& operator=(DnnlGemm&&) noexcept;

  /// Pointers need no alignment beyond the platform's for unaligned vector access. Throws
  /// Error(kInternal) with oneDNN's message.
  void run(const GemmShape& shape, const void* a, const void* b, float* c);

  /// Name of the implementation oneDNN picks for a shape, e.g. "brg:avx512_core_bf16".
  [[nodiscard]] std::string implementation(const GemmShape& shape);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Whether bf16 products are the fast choice: the chosen instruction set has them and this oneDNN
/// runs them on AVX512_BF16 or AMX. Elsewhere they are emulated or absent and f32 is faster.
[[nodiscard]] bool prefers_bf16_gemm(Isa isa);

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_DNNL_GEMM_H_
