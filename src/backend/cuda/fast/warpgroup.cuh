#ifndef TWILIGHT_BACKEND_CUDA_FAST_WARPGROUP_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_WARPGROUP_CUH_

#include <type_traits>

#include <cuda.h>

#include "backend/cuda/fast/barrier.cuh"
#include "backend/cuda/fast/device_ops.cuh"

/// sm_90a: products of a group of four warps that run beside it, and copies by the copy unit.
///
/// Operands in shared memory are tiles of 64 16-bit elements (128 bytes) a row whose 16-byte pieces
/// are exchanged by the row's low three bits, on 1024-byte boundaries. Accumulator 4 j + c of a
/// lane 4 g + t of warp w is row 16 w + g + 8 (c / 2), column 8 j + 2 t + c % 2.
namespace twilight::cuda_fast {

/// Descriptor of a tile at a shared-memory address: `lead` bytes between its 64-element columns
/// (operands whose rows are the summed dimension alone), 1024 bytes between groups of eight rows.
__device__ __forceinline__ std::uint64_t tile_descriptor(std::uint32_t at, std::uint32_t lead) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 / 16} << 32;
  return (std::uint64_t{at & 0x3ffffU} >> 4) | std::uint64_t{lead / 16} << 16 | kEightRows |
         kSwizzle128;
}

/// Before the first product after registers or shared memory were written.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// All but the last kPending groups have ended.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving accesses of accumulators over a wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Operands of inline assembly: 32 accumulators from element i on.
#define TWILIGHT_ACC_8(d, i)                                                            \
  "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), \
      "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define TWILIGHT_ACC_32(d, i)                                                    \
  TWILIGHT_ACC_8(d, i), TWILIGHT_ACC_8(d, (i) + 8), TWILIGHT_ACC_8(d, (i) + 16), \
      TWILIGHT_ACC_8(d, (i) + 24)
#define TWILIGHT_NAMES_32                                                                      \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31"
#define TWILIGHT_NAMES_64                                                                     \
  TWILIGHT_NAMES_32                                                                           \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

/// d (64 x 128) = or += a (64 x 16) b (16 x 128), both from shared memory with the summed dimension
/// along rows.
template <typename Element>
__device__ __forceinline__ void product_tiles(float (&d)[64], std::uint64_t a, std::uint64_t b,
                                              int add) {
#define TWILIGHT_PRODUCT(type)                                                            \
  asm volatile(                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TWILIGHT_NAMES_64 \
      "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                    \
      : TWILIGHT_ACC_32(d, 0), TWILIGHT_ACC_32(d, 32)                                     \
      : "l"(a), "l"(b), "r"(add))
  if constexpr (std::is_same_v<Element, Bf16>) {
    TWILIGHT_PRODUCT("bf16");
  } else {
    TWILIGHT_PRODUCT("f16");
  }
#undef TWILIGHT_PRODUCT
}

/// d (64 x 2 kCount) = or += a (64 x 16, registers) b, whose rows in shared memory are the summed
/// dimension.
template <typename Element, int kCount>
__device__ __forceinline__ void product_rows(float (&d)[kCount], const std::uint32_t* a,
                                             std::uint64_t b, int add) {
#define TWILIGHT_PRODUCT_128(type)                                                        \
  asm volatile(                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TWILIGHT_NAMES_64 \
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}"                                         \
      : TWILIGHT_ACC_32(d, 0), TWILIGHT_ACC_32(d, 32)                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
#define TWILIGHT_PRODUCT_64(type)                                                        \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" TWILIGHT_NAMES_32 \
      "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"                                        \
      : TWILIGHT_ACC_32(d, 0)                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))
  static_assert(kCount == 32 || kCount == 64);
  if constexpr (kCount == 64) {
    if constexpr (std::is_same_v<Element, Bf16>) {
      TWILIGHT_PRODUCT_128("bf16");
    } else {
      TWILIGHT_PRODUCT_128("f16");
    }
  } else {
    if constexpr (std::is_same_v<Element, Bf16>) {
      TWILIGHT_PRODUCT_64("bf16");
    } else {
      TWILIGHT_PRODUCT_64("f16");
    }
  }
#undef TWILIGHT_PRODUCT_128
#undef TWILIGHT_PRODUCT_64
}
#undef TWILIGHT_ACC_8
#undef TWILIGHT_ACC_32
#undef TWILIGHT_NAMES_32
#undef TWILIGHT_NAMES_64

/// Makes writes of shared memory that this thread has made or seen visible to products.
__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Arrives, and holds the phase open until `bytes` more have been copied.
__device__ __forceinline__ void arrive_expecting(std::uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}
/// Has one box of a 4-dimensional plane copied to `to`, counted by a barrier.
__device__ __forceinline__ void copy_box(std::uint32_t to, const CUtensorMap& map, int c0, int c1,
                                         int c2, int c3, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}
/// Waits for the end of a phase of this parity.
__device__ __forceinline__ void wait_phase(std::uint32_t at, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(at),
      "r"(parity)
      : "memory");
}

/// Registers of a thread from here on; the whole warpgroup calls it.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_WARPGROUP_CUH_
