#include "backend/cuda/fast/fast_step.h"
#include "backend/cuda/fast/step_state.cuh"

namespace twilight::cuda_fast {
namespace {

template <Scheme kScheme, int kDim, int kHeads, int kThreads>
int bytes_of(int cluster) {
  switch (cluster) {
    case 2:
      return sizeof(Fixed<Config<kDim, kHeads, kThreads, 2, kScheme, Bf16>>);
    case 4:
      return sizeof(Fixed<Config<kDim, kHeads, kThreads, 4, kScheme, Bf16>>);
    case 8:
      return sizeof(Fixed<Config<kDim, kHeads, kThreads, 8, kScheme, Bf16>>);
    default:
      return sizeof(Fixed<Config<kDim, kHeads, kThreads, 1, kScheme, Bf16>>);
  }
}

template <Scheme kScheme, int kDim, int kHeads>
int bytes_of(int threads, int cluster) {
  if (threads == 512) return bytes_of<kScheme, kDim, kHeads, 512>(cluster);
  return bytes_of<kScheme, kDim, kHeads, 1024>(cluster);
}

template <Scheme kScheme, int kDim>
int bytes_of(int heads, int threads, int cluster) {
  // Rows of eight heads are longer; fewer heads than four are laid out as four.
  return heads == 8 ? bytes_of<kScheme, kDim, 8>(threads, cluster)
                    : bytes_of<kScheme, kDim, 4>(threads, cluster);
}

}  // namespace

int fixed_bytes(bool paper, int dim, int heads, int threads, int cluster) {
  if (paper) {
    return dim == 64 ? bytes_of<Scheme::kPaper, 64>(heads, threads, cluster)
                     : bytes_of<Scheme::kPaper, 128>(heads, threads, cluster);
  }
  return dim == 64 ? bytes_of<Scheme::kAdaptive, 64>(heads, threads, cluster)
                   : bytes_of<Scheme::kAdaptive, 128>(heads, threads, cluster);
}

}  // namespace twilight::cuda_fast
