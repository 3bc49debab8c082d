#ifndef TWILIGHT_BACKEND_CPU_KERNELS_KERNELS_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_KERNELS_H_

#include "backend/cpu/isa.h"

// One table of function pointers per kernel group (index, select, attend, model), each declared in
// kernels/<group>.h and filled once per instruction set by kernels/<group>-inl.h. The body's region
// ends with
//
//   const IndexKernels& index_kernels() { static constexpr IndexKernels kTable = {...}; return
//   kTable; }
//
// inside namespace twilight::cpu::<isa>, and kernels/<group>.h ends with
// TWILIGHT_DECLARE_KERNELS(IndexKernels, index_kernels), which also gives index_kernels(Isa).
#define TWILIGHT_DECLARE_ONE(isa_, Table, getter) \
  namespace isa_ {                                \
  const Table& getter();                          \
  }
#if defined(__x86_64__)
#define TWILIGHT_DECLARE_KERNELS(Table, getter)       \
  TWILIGHT_DECLARE_ONE(scalar, Table, getter)         \
  TWILIGHT_DECLARE_ONE(avx2, Table, getter)           \
  TWILIGHT_DECLARE_ONE(avx512, Table, getter)         \
  TWILIGHT_DECLARE_ONE(avx512_bf16, Table, getter)    \
  [[nodiscard]] inline const Table& getter(Isa isa) { \
    switch (isa) {                                    \
      case Isa::avx2:                                 \
        return avx2::getter();                        \
      case Isa::avx512:                               \
        return avx512::getter();                      \
      case Isa::avx512_bf16:                          \
        return avx512_bf16::getter();                 \
      case Isa::scalar:                               \
        break;                                        \
    }                                                 \
    return scalar::getter();                          \
  }
#elif defined(__aarch64__)
#define TWILIGHT_DECLARE_KERNELS(Table, getter)                  \
  TWILIGHT_DECLARE_ONE(scalar, Table, getter)                    \
  TWILIGHT_DECLARE_ONE(neon, Table, getter)                      \
  [[nodiscard]] inline const Table& getter(Isa isa) {            \
    return isa == Isa::neon ? neon::getter() : scalar::getter(); \
  }
#else
#define TWILIGHT_DECLARE_KERNELS(Table, getter) \
  TWILIGHT_DECLARE_ONE(scalar, Table, getter)   \
  [[nodiscard]] inline const Table& getter(Isa) { return scalar::getter(); }
#endif

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_KERNELS_H_
