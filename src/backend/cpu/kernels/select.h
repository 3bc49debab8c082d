#ifndef TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

struct SelectKernels {
  int placeholder;
};

TWILIGHT_DECLARE_KERNELS(SelectKernels, select_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_SELECT_H_
