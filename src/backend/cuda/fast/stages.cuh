#ifndef TWILIGHT_BACKEND_CUDA_FAST_STAGES_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_STAGES_CUH_

#include <cstdint>

/// Asynchronous copies into shared memory and loads of matrix operands from there. Rows of 16-byte
/// pieces lie with the pieces exchanged by the row's low three bits, so that eight rows of one
/// piece meet no bank twice.
namespace twilight::cuda_fast {

/// Byte of a piece; kPieces of a row is a multiple of 8.
template <int kPieces>
__device__ __forceinline__ std::uint32_t piece_at(int row, int piece) {
  return static_cast<std::uint32_t>((row * kPieces + (piece ^ (row & 7))) * 16);
}

/// 16 bytes to shared memory; zeros, and nothing read, where not `inside`.
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
/// kBytes of global memory to shared memory, 4, 8 or 16.
template <int kBytes>
__device__ __forceinline__ void copy_lane(void* to, const void* from) {
  const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes)
                 : "memory");
  }
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// All but the last kPending groups have arrived.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives row r of matrix i.
__device__ __forceinline__ void load_matrices(std::uint32_t (&x)[4], std::uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_transposed(std::uint32_t (&x)[4], std::uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_STAGES_CUH_
