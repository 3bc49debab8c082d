#ifndef TWILIGHT_BACKEND_CPU_KERNELS_MODEL_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_MODEL_H_

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

struct ModelKernels {
  int placeholder;
};

TWILIGHT_DECLARE_KERNELS(ModelKernels, model_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_MODEL_H_
