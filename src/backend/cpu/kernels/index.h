#ifndef TWILIGHT_BACKEND_CPU_KERNELS_INDEX_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_INDEX_H_

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

struct IndexKernels {
  int placeholder;
};

TWILIGHT_DECLARE_KERNELS(IndexKernels, index_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_INDEX_H_
