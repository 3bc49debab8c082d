#ifndef TWILIGHT_BACKEND_CUDA_FAST_STEP_LAUNCH_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_STEP_LAUNCH_CUH_

#include "backend/cuda/fast/fast_step.h"
#include "backend/cuda/fast/step_kernel.cuh"

/// From run-time shapes to kernel instantiations.
namespace twilight::cuda_fast {

template <class C>
cudaError_t launch_config(const StepLaunch& launch, const StepArgs& args, cudaStream_t stream) {
  const auto kernel = step_kernel<C>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, args.smem.bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.problems * C::kCluster));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(args.smem.bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {C::kCluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = C::kCluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

/// Shapes a (D, heads) is compiled for, of the instantiations the benchmarks tune; the others make
/// do with fewer. Groups of two and three run as four.
template <Scheme kScheme, typename Element, int kDim, int kHeads>
cudaError_t launch_shape(const StepLaunch& launch, const StepArgs& args, cudaStream_t stream) {
  if (launch.threads == 512 && launch.cluster == 1) {
    return launch_config<Config<kDim, kHeads, 512, 1, kScheme, Element>>(launch, args, stream);
  }
  if constexpr (kDim == 128) {
    if (launch.threads == 512 && launch.cluster == 8) {
      return launch_config<Config<kDim, kHeads, 512, 8, kScheme, Element>>(launch, args, stream);
    }
  }
  if constexpr (kDim == 128 && kHeads <= 4) {
    if (launch.threads == 1024 && launch.cluster == 1) {
      return launch_config<Config<kDim, kHeads, 1024, 1, kScheme, Element>>(launch, args, stream);
    }
    if (launch.threads == 512 && launch.cluster == 2) {
      return launch_config<Config<kDim, kHeads, 512, 2, kScheme, Element>>(launch, args, stream);
    }
  }
  return cudaErrorInvalidConfiguration;
}

template <Scheme kScheme, typename Element>
cudaError_t launch_scheme(const StepLaunch& launch, const StepArgs& args, cudaStream_t stream) {
  if (launch.dim == 128) {
    if (launch.heads == 4) return launch_shape<kScheme, Element, 128, 4>(launch, args, stream);
    if (launch.heads == 1) return launch_shape<kScheme, Element, 128, 1>(launch, args, stream);
    if (launch.heads == 8) return launch_shape<kScheme, Element, 128, 8>(launch, args, stream);
  } else if (launch.dim == 64) {
    if (launch.heads == 1) return launch_shape<kScheme, Element, 64, 1>(launch, args, stream);
    if (launch.heads == 4) return launch_shape<kScheme, Element, 64, 4>(launch, args, stream);
    if (launch.heads == 8) return launch_shape<kScheme, Element, 64, 8>(launch, args, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_STEP_LAUNCH_CUH_
