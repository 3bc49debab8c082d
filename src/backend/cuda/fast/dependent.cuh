#ifndef TWILIGHT_BACKEND_CUDA_FAST_DEPENDENT_CUH_
#define TWILIGHT_BACKEND_CUDA_FAST_DEPENDENT_CUH_

#include <cuda_runtime_api.h>

/// Programmatic dependent launches: a small kernel is launched while the one before it still runs,
/// and waits inside. Before sm_90 every call is an ordinary launch.
namespace twilight::cuda_fast {

/// Lets the next kernel start once every block has come here.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until all kernels before this one have ended and their writes are visible. Every block
/// must call it before it ends.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Gives a kernel's multiprocessors as much shared memory as kernels around it have: one with
/// another split of L1 waits until they are idle.
template <typename... Params>
cudaError_t keep_shared_memory(void (*kernel)(Params...)) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

/// In clusters of kCluster blocks.
template <int kCluster = 1, typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared,
                             cudaStream_t stream, bool dependent, const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (kCluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {kCluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_DEPENDENT_CUH_
