#ifndef TWILIGHT_BACKEND_CPU_SIMD_H_
#define TWILIGHT_BACKEND_CPU_SIMD_H_

// Included by the *-inl.h kernel bodies after an isa/ header has chosen the target. Standard
// headers come before the target region, so none of their inline functions is compiled for a newer
// instruction set.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <hwy/highway.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Opens the region of a kernel body: everything up to TWILIGHT_AFTER_NAMESPACE is compiled for the
// chosen instruction set, in the namespace twilight::cpu::<isa>.
#if defined(HWY_TARGET_STR)
#define TWILIGHT_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR TWILIGHT_EXTRA_TARGETS)
#define TWILIGHT_AFTER_NAMESPACE() HWY_POP_ATTRIBUTES
#else
#define TWILIGHT_BEFORE_NAMESPACE()
#define TWILIGHT_AFTER_NAMESPACE()
#endif

#endif  // TWILIGHT_BACKEND_CPU_SIMD_H_
