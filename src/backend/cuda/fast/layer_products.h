#ifndef TWILIGHT_BACKEND_CUDA_FAST_LAYER_PRODUCTS_H_
#define TWILIGHT_BACKEND_CUDA_FAST_LAYER_PRODUCTS_H_

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "backend/cuda/fast/rows_linear.h"
#include "twilight/types.h"

/// Several products of few rows, one after the other, in one launch of one block on every
/// multiprocessor: weights of a product are read while the one before ends.
namespace twilight::cuda_fast {

inline constexpr int kMostLayerSteps = 4;

/// A product, and how its x comes to be.
struct LayerStep {
  enum class Before : std::int32_t {
    kNothing,  ///< rows.x is there, or the step before writes it as its act
    kRound,    ///< rows.x is `source` rounded
    kNorm,     ///< rows.x is rms_norm(source) rounded; where the step before is one of kStore, it
               ///< adds to `source`
  };
  RowsArgs rows;
  Before before = Before::kNothing;
  const float* source = nullptr;  ///< [m, cols], 16-byte aligned rows
  std::int64_t source_stride = 0;
  const float* norm_weight = nullptr;
  float eps = 0;

  // Set by the launcher.
  std::int32_t bands = 0;   ///< runs of up to eight tiles
  std::int32_t stages = 0;  ///< of a band
  bool whole = false;       ///< a block has whole bands
};

/// One plane of a paged cache of bf16 or f16 rows, strides in elements.
struct CacheRows {
  void* data = nullptr;  ///< null: none
  std::int64_t page_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;
  std::int32_t page_size = 0;
  std::int32_t head_dim = 0;
  bool bf16 = false;
};

struct LayerArgs {
  LayerStep step[kMostLayerSteps];
  std::int32_t num_steps = 0;
  /// Where products of the last step's matrices go besides: row n to slot slots[n], page * P +
  /// offset.
  CacheRows cache[3];
  const std::int64_t* slots = nullptr;

  // Set by the launcher.
  std::int32_t ring = 0;  ///< stages in shared memory
  float* parts = nullptr;
  std::uint32_t* counters = nullptr;
};

/// Of a device: multiprocessors and shared memory of a block.
struct LayerDevice {
  std::int32_t blocks = 0;
  std::int32_t shared_bytes = 0;
};

/// Whether the kernel takes a step of these shapes.
bool layer_step_fits(const LayerStep& step, const LayerDevice& device);
/// Memory the launches of one stream share, zeros before the first.
std::size_t layer_bytes(const LayerDevice& device);
/// A row's result depends on nothing but its x, the matrices and the device: the same bits in any
/// batch.
void layer_products(const LayerArgs& args, DType dtype, const LayerDevice& device, void* memory,
                    cudaStream_t stream);

}  // namespace twilight::cuda_fast

#endif  // TWILIGHT_BACKEND_CUDA_FAST_LAYER_PRODUCTS_H_
