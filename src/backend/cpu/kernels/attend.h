#ifndef TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_H_
#define TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_H_

#include "backend/cpu/kernels/kernels.h"
#include "ops/params.h"

namespace twilight::cpu {

struct AttendKernels {
  int placeholder;
};

TWILIGHT_DECLARE_KERNELS(AttendKernels, attend_kernels)

}  // namespace twilight::cpu

#endif  // TWILIGHT_BACKEND_CPU_KERNELS_ATTEND_H_
